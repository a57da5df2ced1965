"""Reading adapters: PEFT's rank and alpha rules, and every refusal."""

import json
import math
import os
import pickle
import tempfile
import time
import unicodedata
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import regex
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors.torch import save
from torch import Tensor

from csulora_cli import patterns
from csulora_cli.adapter import Adapter, describe, read_adapter
from csulora_cli.errors import AdapterError, UnsupportedError
from csulora_cli.formats.config import CONFIG_NAME, KNOWN_FIELDS, MAX_RANK, REFUSED_FIELDS
from csulora_cli.formats.dialect import PEFT
from csulora_cli.patterns import time_limit, value_for

WEIGHTS_NAME = PEFT.weights_name
QUICK = settings(max_examples=50, deadline=None)

NAME = "model.layers.0.self_attn.q_proj"
PLAIN: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}


def key(letter: str, name: str = NAME) -> str:
    return f"base_model.model.{name}.lora_{letter}.weight"


def factors(*names: str, rank: int = 2, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name in names or (NAME,):
        tensors[key("A", name)] = torch.randn(rank, 5, generator=generator).to(dtype)
        tensors[key("B", name)] = torch.randn(3, rank, generator=generator).to(dtype)
    return tensors


def write(folder: Path, config: Any = None, tensors: Mapping[str, Tensor] | bytes | None = None) -> Path:
    """An adapter folder; `config` may be raw text or bytes, `tensors` raw bytes."""
    config = PLAIN if config is None else config
    text = config if isinstance(config, (str, bytes)) else json.dumps(config)
    (folder / CONFIG_NAME).write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    tensors = factors() if tensors is None else tensors
    (folder / WEIGHTS_NAME).write_bytes(tensors if isinstance(tensors, bytes) else save(dict(tensors)))
    return folder


def refused(folder: Path, kind: type[AdapterError] = AdapterError) -> str:
    """The message of the refusal, after checking what holds for every refusal."""
    with pytest.raises(AdapterError) as caught:
        read_adapter(folder)
    assert_well_formed(caught.value)
    assert isinstance(caught.value, kind)
    assert isinstance(caught.value, UnsupportedError) == (kind is UnsupportedError)
    return caught.value.message


def assert_well_formed(error: AdapterError) -> None:
    assert error.exit_code == 4
    assert error.message
    for text in (error.message, error.hint):
        assert len(text) < 800
        assert not {unicodedata.category(char) for char in text} & {"Cc", "Cf", "Cs", "Zl", "Zp"}


# Ranks, alphas and scales


def read(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> Adapter:
    return read_adapter(write(folder, {"peft_type": "LORA", **config}, tensors))


def test_a_plain_adapter(tmp_path: Path) -> None:
    tensors = factors(NAME, "lm_head")
    adapter = read(tmp_path, {"r": 2, "lora_alpha": 6, "base_model_name_or_path": "org/host"}, tensors)
    assert [module.name for module in adapter.sites] == ["lm_head", NAME]
    module = adapter.sites[1]
    assert (module.rank, module.in_features, module.out_features) == (2, 5, 3)
    assert (module.alpha, module.scale) == (6.0, 3.0)
    assert torch.equal(module.lora_a, tensors[key("A")])
    assert torch.equal(module.lora_b, tensors[key("B")])
    assert (adapter.base, adapter.dtypes, adapter.ranks) == ("org/host", ["float32"], [2])
    assert describe(adapter) == "LoRA rank 2, scale 3, float32, 2 modules"


def test_defaults_are_those_of_peft(tmp_path: Path) -> None:
    default = peft.LoraConfig()
    assert (default.r, default.lora_alpha) == (8, 8)
    module = read(tmp_path, {}, factors(rank=8)).sites[0]
    assert (module.rank, module.alpha, module.scale) == (8, 8.0, 1.0)


@pytest.mark.parametrize("alpha", [16, 1, 0, -4, 0.5, 2.5e3])
@pytest.mark.parametrize("rank", [1, 2, 9])
def test_scales(tmp_path: Path, rank: int, alpha: float) -> None:
    config = {"r": rank, "lora_alpha": alpha}
    assert read(tmp_path, config, factors(rank=rank)).sites[0].scale == pytest.approx(alpha / rank)
    config["use_rslora"] = True
    assert read(tmp_path, config, factors(rank=rank)).sites[0].scale == pytest.approx(alpha / math.sqrt(rank))


def test_patterns_are_read_independently(tmp_path: Path) -> None:
    tensors = {**factors("a.q", rank=3), **factors("a.k", rank=2), **factors("b.q", rank=3)}
    config = {"r": 2, "lora_alpha": 4, "rank_pattern": {"q": 3}, "alpha_pattern": {"a.q": 30, "k": 5}}
    adapter = read(tmp_path, config, tensors)
    found = {module.name: (module.rank, module.alpha, module.scale) for module in adapter.sites}
    assert found == {"a.q": (3, 30.0, 10.0), "a.k": (2, 5.0, 2.5), "b.q": (3, 4.0, pytest.approx(4 / 3))}
    assert describe(adapter) == "LoRA rank 2/3, scale 1.33 to 10, float32, 3 modules"


def test_rslora_divides_by_the_root_of_the_modules_own_rank(tmp_path: Path) -> None:
    config = {"r": 2, "lora_alpha": 6, "use_rslora": True, "rank_pattern": {"q_proj": 9}}
    assert read(tmp_path, config, factors(rank=9)).sites[0].scale == pytest.approx(2.0)


def test_null_patterns_are_empty(tmp_path: Path) -> None:
    assert read(tmp_path, {**PLAIN, "rank_pattern": None, "alpha_pattern": None}).sites[0].rank == 2


PATTERN_RULES = [
    ("q_proj", "model.layers.0.self_attn.q_proj", True),
    ("proj", "self_attn.q_proj", False),
    ("q_pro", "self_attn.q_proj", False),
    ("attn.q_proj", "self_attn.q_proj", False),
    ("layers.1", "model.layers.1.self_attn.q_proj", False),
    ("q_proj.weight", "model.layers.0.self_attn.q_proj", False),
    ("base_model.model.model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj", False),
    ("layers.1.self_attn.q_proj", "model.layers.1.self_attn.q_proj", True),
    ("layers.1.self_attn.q_proj", "model.layers.11.self_attn.q_proj", False),
    ("layers.1.*q_proj", "model.layers.10.self_attn.q_proj", True),
    ("layers.1.*q_proj", "model.layers.11.self_attn.q_proj", True),
    ("blocks.1.1", "blocks.111", True),
    ("model.layers.0.self_attn.q_proj", "vision.model.layers.0.self_attn.q_proj", True),
    ("block.0.layer.0.SelfAttention.q", "encoder.block.0.layer.0.SelfAttention.q", True),
    ("block.0.layer.0.SelfAttention.q", "decoder.block.0.layer.0.SelfAttention.q", True),
    ("^model.layers.0.self_attn.q_proj", "vision.model.layers.0.self_attn.q_proj", False),
    ("^model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj", True),
    ("q_proj|v_proj", "model.layers.0.self_attn.v_proj", True),
    (r"layers\.[0-3]\.mlp\.up", "model.layers.3.mlp.up", True),
    (r"layers\.[0-3]\.mlp\.up", "model.layers.4.mlp.up", False),
]


@pytest.mark.parametrize(("pattern", "name", "is_hit"), PATTERN_RULES)
def test_pattern_keys_match_as_in_peft(pattern: str, name: str, is_hit: bool) -> None:
    assert value_for({pattern: 3}, name, 8, "rank_pattern") == (3 if is_hit else 8)
    assert (get_pattern_key([pattern], name) == pattern) == (is_hit or pattern == name)


def test_the_first_key_in_file_order_wins(tmp_path: Path) -> None:
    first = '{"peft_type": "LORA", "r": 2, "alpha_pattern": {"q_proj": 4, "model.layers.0.self_attn.q_proj": 10}}'
    second = '{"peft_type": "LORA", "r": 2, "alpha_pattern": {"model.layers.0.self_attn.q_proj": 10, "q_proj": 4}}'
    assert read_adapter(write(tmp_path, first)).sites[0].alpha == 4
    assert read_adapter(write(tmp_path, second)).sites[0].alpha == 10


@QUICK
@given(st.lists(st.sampled_from([rule[0] for rule in PATTERN_RULES]), unique=True), st.sampled_from(PATTERN_RULES))
def test_several_keys_resolve_as_in_peft(keys: list[str], rule: tuple[str, str, bool]) -> None:
    pattern = {pattern_key: index for index, pattern_key in enumerate(keys)}
    name = rule[1]
    want = pattern.get(get_pattern_key(keys, name), -1)
    assert value_for(pattern, name, -1, "rank_pattern") == want


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "pattern",
    ["(", "*", "[", "(?P<x>a)(?P<", "x{99999999999999999999}", "\\", "(" * 5000, "(?:" * 300 + ")" * 300],
)
def test_keys_that_are_no_regular_expressions_are_refused(tmp_path: Path, pattern: str) -> None:
    assert "rank_pattern key" in refused(write(tmp_path, {**PLAIN, "rank_pattern": {pattern: 2}}))


@pytest.mark.timeout(60)
def test_a_key_that_takes_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "MATCH_SECONDS", 0.02)
    with pytest.raises(AdapterError, match="alpha_pattern key") as caught:
        value_for({"(?R)": 3}, "a", 8, "alpha_pattern")  # recurses without end
    assert_well_formed(caught.value)


def test_all_keys_together_may_take_so_long_and_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "TOTAL_SECONDS", 0.2)
    monkeypatch.setattr(patterns, "MATCH_SECONDS", 0.1)
    slow = r"(?:(?:[a-z_.]|\w|.)*)*(?:(?:.|\w)+)+\d(.)\1\1\1"
    times = []
    with time_limit():
        for _ in range(50):
            with pytest.raises(AdapterError, match="takes too long to match"):
                value_for({slow: 1}, NAME, 8, "rank_pattern")
            times.append(time.monotonic())
    assert times[-1] - times[5] < 1  # the time was used up by then; 44 searches would have taken 4.4 s
    assert value_for({"q_proj": 3}, NAME, 8, "rank_pattern") == 3  # and is not missed afterwards


@pytest.mark.parametrize("key", ["(?:q_prof){e<=1}", "[[:alpha:]]_proj", "(?i)Q_PROJ", "(?P<a>q)(?P<a>_)proj"])
def test_what_means_something_else_to_peft_is_refused(key: str) -> None:
    assert regex.match(rf"(.*\.)?({key})$", NAME)  # that is how it would be read
    with pytest.raises(AdapterError, match="no regular expression"):
        value_for({key: 3}, NAME, 8, "rank_pattern")


# Fields


@pytest.mark.parametrize("field", sorted(REFUSED_FIELDS))
def test_each_unsupported_field_is_refused_by_name(tmp_path: Path, field: str) -> None:
    assert field in refused(write(tmp_path, {**PLAIN, field: True}), UnsupportedError)
    message = refused(write(tmp_path, {**PLAIN, field: ["a\n\x1b[31m"]}), UnsupportedError)
    assert field in message


@pytest.mark.parametrize("nothing", [None, False, [], {}])
@pytest.mark.parametrize("field", sorted({*REFUSED_FIELDS, "some_new_field"}))
def test_an_unsupported_field_that_is_off_is_no_obstacle(tmp_path: Path, field: str, nothing: Any) -> None:
    assert len(read_adapter(write(tmp_path, {**PLAIN, field: nothing})).sites) == 1


def test_every_field_that_peft_writes_is_known(tmp_path: Path) -> None:
    peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], task_type="CAUSAL_LM").save_pretrained(str(tmp_path))
    written = json.loads((tmp_path / CONFIG_NAME).read_text())
    assert set(written) <= set(REFUSED_FIELDS) | KNOWN_FIELDS
    assert read_adapter(write(tmp_path, written)).sites[0].scale == 2.0


@pytest.mark.parametrize("field", ["use_dora", "use_rslora", "lora_bias", "ensure_weight_tying", "fan_in_fan_out"])
@pytest.mark.parametrize("value", [1, "true", [], {}, 0])
def test_flags_that_are_neither_true_nor_false_are_refused(tmp_path: Path, field: str, value: Any) -> None:
    assert field in refused(write(tmp_path, {**PLAIN, field: value}))


@pytest.mark.parametrize(
    ("config", "suffix"),
    [
        ({"use_dora": True}, None),
        ({}, "lora_magnitude_vector"),
        ({}, "lora_B.bias"),
        ({"use_dora": True}, "lora_B.bias"),
    ],
)
def test_tensors_that_the_config_does_not_speak_of_are_refused(
    tmp_path: Path, config: dict[str, Any], suffix: str | None
) -> None:
    extra = {f"base_model.model.{NAME}.{suffix}": torch.ones(3)} if suffix else {}
    message = refused(write(tmp_path, {**PLAIN, **config}, {**factors(), **extra}))
    assert "use_dora is" in message or "lora_bias is" in message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("target_modules", 3), ("target_modules", {"q_proj": 1}), ("target_modules", [1]), ("target_modules", [["q"]]),
        ("exclude_modules", True), ("layers_to_transform", "0"), ("layers_to_transform", [0.5]),
        ("layers_to_transform", [True]), ("layers_pattern", 0), ("target_parameters", "experts"),
        ("target_parameters", [None]), ("modules_to_save", "lm_head"),
    ],
)  # fmt: skip
def test_selectors_of_a_wrong_type_are_refused(tmp_path: Path, field: str, value: Any) -> None:
    assert field in refused(write(tmp_path, {**PLAIN, field: value}))


TARGET_RULES: list[tuple[dict[str, Any], bool]] = [
    ({"target_modules": ["q_proj"]}, True),
    ({"target_modules": ["proj"]}, False),
    ({"target_modules": ["self_attn.q_proj"]}, True),
    ({"target_modules": "q_proj"}, False),
    ({"target_modules": r".*q_proj"}, True),
    ({"target_modules": r".*(k|q)_proj|x"}, True),
    ({"target_modules": "all-linear"}, True),
    ({"target_modules": ["q_proj"], "exclude_modules": ["self_attn.q_proj"]}, False),
    ({"target_modules": ["q_proj"], "exclude_modules": r".*layers\.0.*"}, False),
    ({"target_modules": ["q_proj"], "exclude_modules": ["k_proj"]}, True),
    ({"target_modules": ["q_proj"], "layers_to_transform": 0}, True),
    ({"target_modules": ["q_proj"], "layers_to_transform": [1, 2]}, False),
    ({"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"}, True),
    ({"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": ["blocks", "h"]}, False),
]


@pytest.mark.parametrize(("config", "is_hit"), TARGET_RULES)
def test_modules_are_targeted_as_in_peft(tmp_path: Path, config: dict[str, Any], is_hit: bool) -> None:
    folder = write(tmp_path, {**PLAIN, **config})
    if is_hit:
        assert read_adapter(folder).sites
    else:
        assert "does not target" in refused(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.LoraConfig(**config)
    if config["target_modules"] != "all-linear":  # peft looks that up in a model
        found = check_target_module_exists(theirs, NAME)
        assert (bool(found) and type(found).__name__ != "_ExcludedModule") == is_hit


@pytest.mark.parametrize("kind", ["lora", "LOHA", "", None, 1, ["LORA"], "LORA\n", "\x1b]0;evil\x07"])
def test_other_kinds_of_adapter_are_refused(tmp_path: Path, kind: Any) -> None:
    assert "peft_type" in refused(write(tmp_path, {**PLAIN, "peft_type": kind}), UnsupportedError)


def test_a_missing_kind_is_refused(tmp_path: Path) -> None:
    assert "peft_type" in refused(write(tmp_path, {"r": 2}), UnsupportedError)


@pytest.mark.parametrize("bias", ["some", "", None, 1, ["all"]])
def test_biases_of_an_unknown_kind_are_refused(tmp_path: Path, bias: Any) -> None:
    assert "bias = " in refused(write(tmp_path, {**PLAIN, "bias": bias}))


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "eva", "orthogonal"])
def test_inits_that_leave_the_base_alone_are_read(tmp_path: Path, init: Any) -> None:
    assert read_adapter(write(tmp_path, {**PLAIN, "init_lora_weights": init})).sites[0].rank == 2


@pytest.mark.parametrize("init", ["pissa_niter_4", "corda", "loftq", "lora_ga", "new", 1, {}])
def test_inits_that_change_the_base_are_refused(tmp_path: Path, init: Any) -> None:
    assert "init_lora_weights" in refused(write(tmp_path, {**PLAIN, "init_lora_weights": init}), UnsupportedError)


@pytest.mark.parametrize("value", [True, 1, "x", [0], {"a": None}])
def test_unknown_fields_are_refused_by_name(tmp_path: Path, value: Any) -> None:
    assert "brand_new" in refused(write(tmp_path, {**PLAIN, "brand_new": value}), UnsupportedError)


def test_a_hostile_field_name_is_escaped(tmp_path: Path) -> None:
    message = refused(write(tmp_path, {**PLAIN, "a\nb\x1b[2J\u202e": True}), UnsupportedError)
    assert "a\\nb\\x1b[2J\\u202e" in message


@pytest.mark.parametrize("rank", [0, -1, 2.0, "2", True, None, [2], 10**9, MAX_RANK + 1, 10**4000])
def test_ranks_of_a_wrong_type_or_size_are_refused(tmp_path: Path, rank: Any) -> None:
    assert "r in adapter_config.json" in refused(write(tmp_path, {**PLAIN, "r": rank}))
    assert "rank_pattern['x']" in refused(write(tmp_path, {**PLAIN, "rank_pattern": {"x": rank}}))


@pytest.mark.parametrize("alpha", ["16", True, None, [1], {}, 1e10, -1e10, 10**4000])
def test_alphas_of_a_wrong_type_or_size_are_refused(tmp_path: Path, alpha: Any) -> None:
    assert "lora_alpha in adapter_config.json" in refused(write(tmp_path, {**PLAIN, "lora_alpha": alpha}))
    assert "alpha_pattern['x']" in refused(write(tmp_path, {**PLAIN, "alpha_pattern": {"x": alpha}}))


def test_an_alpha_that_overflows_to_infinity_is_refused(tmp_path: Path) -> None:
    assert "lora_alpha" in refused(write(tmp_path, '{"peft_type": "LORA", "r": 2, "lora_alpha": 1e999}'))


@pytest.mark.parametrize("pattern", [[1], "q_proj", 3, True])
@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_patterns_that_are_no_objects_are_refused(tmp_path: Path, field: str, pattern: Any) -> None:
    assert field in refused(write(tmp_path, {**PLAIN, field: pattern}))


# The config file


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "not json", "<html>404</html>", '{"r": 2,}', '{"lora_alpha": NaN}', '{"r": Infinity}',
        '{"r": -Infinity}', "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", b"\xff\xfe{\x00",
        b'{"peft_type": "LORA\xff"}', b"\xef\xbb\xbf{}", '{"r": ' + "9" * 5000 + "}",
    ],
)  # fmt: skip
def test_what_is_no_json_is_refused(tmp_path: Path, text: Any) -> None:
    assert "not valid JSON" in refused(write(tmp_path, text))


@pytest.mark.parametrize("text", ["[]", "null", "3", '"x"', "true"])
def test_json_that_is_no_object_is_refused(tmp_path: Path, text: str) -> None:
    assert "not an object" in refused(write(tmp_path, text))


@pytest.mark.parametrize("opening", ["[", '{"a":'])
@pytest.mark.parametrize("depth", [100_000, 5000])
def test_deeply_nested_json_is_refused(tmp_path: Path, depth: int, opening: str) -> None:
    closing = {"[": "]", '{"a":': "}"}[opening]
    nested = opening * depth + "1" + closing * depth
    assert "nested too deeply" in refused(write(tmp_path, nested))
    assert "nested too deeply" in refused(write(tmp_path, f'{{"peft_type": "LORA", "loftq_config": {nested}}}'))


@pytest.mark.parametrize("depth", [100, 500, 800, 900, 950, 980, 990, 1000])
@pytest.mark.parametrize("field", ["brand_new", "use_dora", "peft_type", "r", "bias", "rank_pattern"])
def test_nesting_up_to_the_parsers_limit_is_refused_too(tmp_path: Path, field: str, depth: int) -> None:
    config = json.dumps({**PLAIN, field: "HERE"}).replace('"HERE"', '{"a":' * depth + "1" + "}" * depth)
    refused_somehow(write(tmp_path, config))


def refused_somehow(folder: Path) -> None:
    with pytest.raises(AdapterError) as caught:
        read_adapter(folder)
    assert_well_formed(caught.value)


def test_a_missing_config_names_what_a_folder_holds(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"adapter_config\.json is missing") as caught:
        read_adapter(tmp_path)
    assert WEIGHTS_NAME in caught.value.hint
    assert_well_formed(caught.value)


def test_missing_weights(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / WEIGHTS_NAME).unlink()
    assert f"{WEIGHTS_NAME} is missing" in refused(tmp_path)


@pytest.mark.parametrize("name", [CONFIG_NAME, WEIGHTS_NAME])
def test_a_folder_in_place_of_a_file_is_refused(tmp_path: Path, name: str) -> None:
    write(tmp_path)
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    assert "not a regular file" in refused(tmp_path)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("name", [CONFIG_NAME, WEIGHTS_NAME])
def test_a_pipe_in_place_of_a_file_is_refused_without_waiting(tmp_path: Path, name: str) -> None:
    write(tmp_path)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    assert "not a regular file" in refused(tmp_path)


def test_a_config_of_absurd_size_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("csulora_cli.adapter.MAX_JSON_BYTES", 2**20)
    assert "larger than 1 MiB" in refused(write(tmp_path, json.dumps({"x": "y" * 2**20})))


def test_a_hostile_folder_name_is_escaped(tmp_path: Path) -> None:
    folder = tmp_path / "evil\n::error::\x1b[31m\u202e"
    folder.mkdir()
    assert "evil\\n::error::\\x1b[31m\\u202e" in refused(folder)


def test_links_to_files_are_read_as_in_the_hub_cache(tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    write(tmp_path / "blobs")
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    assert len(read_adapter(snapshot).sites) == 1


# Pickles


class _Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", "pytorch_model.bin", "x.ckpt"])
def test_a_pickle_is_refused_and_never_opened(tmp_path: Path, name: str) -> None:
    write(tmp_path)
    (tmp_path / WEIGHTS_NAME).unlink()
    marker = tmp_path / "marker"
    (tmp_path / name).write_bytes(pickle.dumps(_Evil(marker)))
    assert "pickle" in refused(tmp_path)
    assert not marker.exists()
    pickle.loads((tmp_path / name).read_bytes())
    assert marker.exists()  # it would have


def test_a_pickle_named_safetensors_is_refused_and_never_opened(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    assert "not a safetensors file" in refused(write(tmp_path, tensors=pickle.dumps(_Evil(marker))))
    assert not marker.exists()


def test_a_pickle_beside_the_weights_is_ignored(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    write(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps(_Evil(marker)))
    assert len(read_adapter(tmp_path).sites) == 1
    assert not marker.exists()


# Tensors


@pytest.mark.parametrize(
    ("suffix", "feature"),
    [
        ("lora_diag", "KaSA"),
        ("lora_C.weight", "not named as PEFT"),
        ("lora_A.weight.extra", "not named as PEFT"),
        ("lora_A.weight\n", "not named as PEFT"),
    ],
)
def test_each_tensor_that_is_no_plain_factor_is_refused_by_name(tmp_path: Path, suffix: str, feature: str) -> None:
    tensors = {**factors(), f"base_model.model.{NAME}.{suffix}": torch.ones(2, 5)}
    message = refused(write(tmp_path, tensors=tensors), UnsupportedError)
    assert feature in message
    assert suffix.strip() in message


@pytest.mark.parametrize("name", [f"{NAME}.lora_A.weight", "base_model.q.lora_A.weight", "lora_A.weight", "", "x"])
def test_tensors_without_the_prefix_are_refused(tmp_path: Path, name: str) -> None:
    refused(write(tmp_path, tensors={**factors(), name: torch.ones(2, 5)}), UnsupportedError)


@pytest.mark.parametrize("letter", ["A", "B"])
def test_a_factor_without_its_partner_is_refused(tmp_path: Path, letter: str) -> None:
    tensors = factors()
    del tensors[key(letter)]
    assert f"has no lora_{letter}" in refused(write(tmp_path, tensors=tensors))


def test_a_file_without_tensors_is_refused(tmp_path: Path) -> None:
    assert "holds no tensors" in refused(write(tmp_path, tensors={}))


@pytest.mark.parametrize("name", ["int8", "int64", "uint8", "bool", "float64"])
@pytest.mark.parametrize("letter", ["A", "B"])
def test_other_dtypes_are_refused(tmp_path: Path, letter: str, name: str) -> None:
    tensors = factors()
    tensors[key(letter)] = torch.ones(tensors[key(letter)].shape).to(getattr(torch, name))
    message = refused(write(tmp_path, tensors=tensors), UnsupportedError)
    assert f"lora_{letter}" in message
    assert name in message


@pytest.mark.parametrize("shape", [(2, 5, 1), (2, 5, 3, 3), (2, 5, 1, 1, 1)])
def test_a_kernel_with_a_matrix_is_no_pair(tmp_path: Path, shape: tuple[int, ...]) -> None:
    tensors = {**factors(), key("A"): torch.ones(shape)}
    assert str(shape) in refused(write(tmp_path, tensors=tensors))


def test_two_kinds_of_factor_for_one_module_are_refused(tmp_path: Path) -> None:
    tensors = {**factors(), f"base_model.model.{NAME}.lora_embedding_A": torch.ones(2, 5)}
    assert "both hold lora_A" in refused(write(tmp_path, tensors=tensors))


@pytest.mark.parametrize("shape", [(), (5,), (0, 5), (2, 0), (0,), (1, 1, 1, 1, 1, 1)])
@pytest.mark.parametrize("letter", ["A", "B"])
def test_factors_without_two_sizes_are_refused(tmp_path: Path, letter: str, shape: tuple[int, ...]) -> None:
    assert "has shape" in refused(write(tmp_path, tensors={**factors(), key(letter): torch.ones(shape)}))


@pytest.mark.parametrize(
    ("shape_a", "shape_b"), [((3, 5), (3, 3)), ((2, 5), (3, 3)), ((3, 5), (3, 2)), ((5, 2), (2, 3)), ((1, 5), (3, 1))]
)
def test_ranks_that_do_not_fit_the_config_are_refused(
    tmp_path: Path, shape_a: tuple[int, int], shape_b: tuple[int, int]
) -> None:
    tensors = {key("A"): torch.ones(shape_a), key("B"): torch.ones(shape_b)}
    message = refused(write(tmp_path, tensors=tensors))
    assert "rank 2" in message
    assert str(shape_a) in message
    assert str(shape_b) in message


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("letter", ["A", "B"])
def test_values_that_are_not_finite_are_refused(tmp_path: Path, letter: str, dtype: torch.dtype, value: float) -> None:
    tensors = factors(dtype=dtype)
    tensors[key(letter)][1, 1] = value
    assert f"lora_{letter} of '{NAME}' holds NaN or Inf" in refused(write(tmp_path, tensors=tensors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_stored_dtypes_and_bits_are_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = factors(dtype=dtype)
    adapter = read_adapter(write(tmp_path, tensors=tensors))
    assert adapter.dtypes == [str(dtype).removeprefix("torch.")]
    assert torch.equal(adapter.sites[0].lora_a, tensors[key("A")])


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[31mb", "a\u202eb", "a\u2028b", "a\x00b", "\x7f" * 300])
def test_hostile_module_names_are_escaped_in_messages(tmp_path: Path, name: str) -> None:
    refused(write(tmp_path, tensors={key("A", name): torch.ones(2, 5)}))
    refused(write(tmp_path, tensors={key("A", name): torch.ones(2), key("B", name): torch.ones(3, 2)}))
    refused(write(tmp_path, tensors={**factors(), f"{name}.weight": torch.ones(2)}), UnsupportedError)


def test_names_that_differ_by_a_trailing_line_break_stay_two_tensors(tmp_path: Path) -> None:
    tensors = {**factors(), key("A") + "\n": torch.full((2, 5), 7.0)}
    refused(write(tmp_path, tensors=tensors), UnsupportedError)


# Damaged files


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 9, 40, -1, -8])
def test_truncated_weights_are_refused(tmp_path: Path, keep: int) -> None:
    assert "not a safetensors file" in refused(write(tmp_path, tensors=save(factors())[:keep]))


@pytest.mark.parametrize(
    "data",
    [
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 132\n",
        b"<!doctype html><title>404</title>" * 20,
        (2**62).to_bytes(8, "little") + b"{}",
        (4).to_bytes(8, "little") + b'["a]',
        (2).to_bytes(8, "little") + b"{}" + b"left over",
        save(factors()) + b"\0",
    ],
)
def test_weights_that_are_something_else_are_refused(tmp_path: Path, data: bytes) -> None:
    assert "not a safetensors file" in refused(write(tmp_path, tensors=data))


@pytest.mark.parametrize("length", [0x280, 0x380, 0x480, 0x580])
def test_a_header_whose_length_begins_as_a_pickle_is_read(tmp_path: Path, length: int) -> None:
    data = save(factors())
    old = int.from_bytes(data[:8], "little")
    padded = length.to_bytes(8, "little") + data[8 : 8 + old].ljust(length) + data[8 + old :]
    assert padded[:2] == bytes([0x80, length >> 8])
    assert len(read_adapter(write(tmp_path, tensors=padded)).sites) == 1


def test_an_unknown_dtype_in_the_header_is_refused(tmp_path: Path) -> None:
    header = json.dumps({key("A"): {"dtype": "F3", "shape": [1], "data_offsets": [0, 1]}}).encode()
    refused(write(tmp_path, tensors=len(header).to_bytes(8, "little") + header + b"\0"))


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_damaged_bytes_never_raise_anything_but_adapter_errors(data: st.DataObject) -> None:
    files = {CONFIG_NAME: json.dumps({**PLAIN, "rank_pattern": {"q_proj": 2}}).encode(), WEIGHTS_NAME: save(factors())}
    victim = data.draw(st.sampled_from(sorted(files)))
    damaged = bytearray(files[victim])
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    files[victim] = bytes(damaged)
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        try:
            adapter = read_adapter(Path(folder))
        except AdapterError as error:
            assert_well_formed(error)
        else:
            assert all(bool(torch.isfinite(module.lora_a).all()) for module in adapter.sites)


def test_digests_are_of_the_bytes_that_were_read(tmp_path: Path) -> None:
    from csulora_cli.files import sha256_of

    adapter = read_adapter(write(tmp_path))
    assert adapter.sha256 == {name: sha256_of(tmp_path / name) for name in (CONFIG_NAME, WEIGHTS_NAME)}


@pytest.mark.parametrize("base", [None, "", 3, ["x"], {}])
def test_a_base_that_is_no_text_is_none(tmp_path: Path, base: Any) -> None:
    assert read_adapter(write(tmp_path, {**PLAIN, "base_model_name_or_path": base})).base is None
