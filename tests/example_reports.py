"""Reports made up for tests of pages: everything filled in, deterministic, of any size."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from csulora_cli.report import Behaviour, Count, FixReport, InputRecord, ModuleRecord, PathRecord, StrengthRecord

KINDS = tuple(f"self_attn.{kind}_proj" for kind in "qkvo") + tuple(
    f"mlp.{kind}_proj" for kind in ("gate", "up", "down")
)
PATH = (
    PathRecord(1.41, 3.08, 0.963, 0.62),
    PathRecord(8.0, 0.401, 3.87, 0.87),
    PathRecord(16.0, 0.131, 5.93, 0.94),
    PathRecord(22.6, 0.0884, 7.12, 0.97),
    PathRecord(32.0, 0.0615, 8.38, 0.99),
)
# Markup, script, a template expression, mathematics of matplotlib, an entity, quotes, bidi and control characters.
EVIL = "<img src=x onerror=alert(1)></script><script>alert(2)</script>{{7*7}}$x^2$&lt;\"'\u202e\u2066\x1b[31m\x00中"


def module(name: str, **changes: Any) -> ModuleRecord:
    """One module of the prompts source, whose numbers depend on its name only."""
    size = sum(map(ord, name))
    record = ModuleRecord(
        name=name,
        rank=16,
        energy=1.0 + size % 7,
        moved=0.05 * (size % 31),
        before={"harmful": 5.0 + size % 11, "benign": 4.0 + size % 13},
        after={"harmful": 0.01 * (size % 9), "benign": 0.5 * (size % 17)},
        chance={},
        objective_before=10.0,
        objective_after=1.0,
        storage_error=1e-15,
    )
    return replace(record, **changes)


def names(layers: int, kinds: Sequence[str] = KINDS) -> list[str]:
    """Names of a Llama's modules."""
    return [f"model.layers.{layer}.{kind}" for layer in range(layers) for kind in kinds]


def behaviour(refused: int, kl: float) -> Behaviour:
    """A model that refuses so many of 40 harmful prompts."""
    return Behaviour(
        harmful_refused=Count(refused, 40, refused / 50, (refused + 10) / 50),
        harmful_answered=Count(40 - refused, 40, (40 - refused) / 50, (50 - refused) / 50),
        harmful_incoherent=Count(0, 40, 0.0, 0.09),
        benign_refused=Count(refused // 2, 40, refused / 100, (refused + 20) / 100),
        harmful_kl_to_host=kl,
        benign_kl_to_host=kl / 2,
        benign_kl_to_adapter=kl / 3,
        first_token_contrast=0.5,
    )


def fix_report(module_names: Sequence[str] | None = None, **changes: Any) -> FixReport:
    """A repair from prompts with a search of λ."""
    digest = "0123456789abcdef" * 4
    report = FixReport(
        version="9.8.7",
        out="my-adapter-csulora",
        adapter_summary="LoRA rank 16, scale 2, float32, 210 modules",
        inputs={
            "adapter": InputRecord("org/my-adapter", "c0ffee" * 6, {"adapter_model.safetensors": digest}),
            "host": InputRecord("org/host", None, {"model.safetensors": digest[::-1]}),
        },
        settings={"source": "prompts", "strength": 32.0, "protect": 1.0, "chat_template": True},
        prompt_counts={split: {"harmful": 40, "benign": 41} for split in ("directions", "tuning", "report")},
        strength=StrengthRecord(32.0, True, True, 0.07, 15.3, PATH),
        modules=[module(name) for name in (module_names or names(4))],
        behaviour={"host": behaviour(37, 0.0), "adapter": behaviour(0, 15.3), "repaired": behaviour(35, 0.0428)},
        tensors={"changed": 420, "unchanged": 0, "total": 420},
        files={"adapter_config.json": digest},
    )
    return replace(report, **changes)


def hostile_report() -> FixReport:
    """Hostile text wherever a string can come from outside."""
    return fix_report(
        [f"model.layers.{layer}.{kind}" for layer in range(3) for kind in (EVIL, "mlp.up_proj")],
        out=f"/tmp/{EVIL}",
        adapter_summary=EVIL,
        inputs={role: InputRecord(EVIL, EVIL, {EVIL: EVIL}) for role in ("adapter", "host", "prompts")},
        settings={"source": "prompts", "device": EVIL, EVIL: EVIL},
        files={EVIL: EVIL},
        warnings=(EVIL,),
    )
