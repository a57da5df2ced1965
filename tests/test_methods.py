"""The methods that `csulora compare` knows, against their formulas with dense matrices in float64."""

import math
import pkgutil
from dataclasses import dataclass, replace
from importlib import import_module

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from csulora_cli import methods
from csulora_cli.engine.attach import Factors
from csulora_cli.engine.inputs import Form, InputGroup, Moments
from csulora_cli.engine.prompts_source import Confined, Solver
from csulora_cli.errors import UsageError
from csulora_cli.formats.site import Kind, Place, Site
from csulora_cli.methods import REGISTRY, choose, lssf, random_subspace, rotated, s3lora, safelora, safelora_projector
from csulora_cli.methods.method import (
    ConfinedMethod,
    DirectionsMethod,
    DisplacementMethod,
    FactorsMethod,
    Family,
    Method,
    MomentsMethod,
    counts,
    linear,
    logarithmic,
    random_basis,
    seeded,
)
from csulora_cli.promptset import Prompts
from csulora_cli.solver.displacement import leading_directions

QUICK = settings(max_examples=25, deadline=None)
ENERGY = 0.9


@dataclass(frozen=True)
class Case:
    """Some modules, the displacements of their weights, and the inputs that they read, all with some scale."""

    modules: tuple[Site, ...]
    displacements: dict[str, Tensor]
    moments: Moments

    @property
    def directions(self) -> dict[str, methods.method.Directions]:
        return {name: leading_directions(dense, ENERGY).compact() for name, dense in self.displacements.items()}

    @property
    def dense_moments(self) -> tuple[Tensor, Tensor]:
        """C_h and C_b."""
        faded, benign = self.moments.faded, self.moments.benign
        if self.moments.form is Form.TOKENS:
            return faded @ faded.mT, benign @ benign.mT
        return faded, benign


def draw_case(seed: int, count: int, out: int, width: int, rank: int, size: float, are_tokens: bool) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    modules, displacements = [], {}
    for index in range(count):
        name = f"layers.{index}.proj"
        scale = 0.5 + index
        modules.append(Site(name, draw(rank, width).float(), draw(out, rank).float(), scale * rank, scale))
        decay = torch.arange(1, min(out, width) + 1, dtype=torch.float64).pow(-1.5)
        displacements[name] = size * draw(out, min(out, width)) * decay @ draw(min(out, width), width)
    faded, benign = draw(width, 3 * width), draw(width, 2 * width)
    faded[0] *= 5
    if not are_tokens:
        faded, benign = faded @ faded.mT, benign @ benign.mT
    else:
        faded, benign = faded[:, : width // 2 + 1], benign[:, :2]
    return Case(
        tuple(modules),
        displacements,
        Moments(faded / width, benign / width, Form.TOKENS if are_tokens else Form.MOMENT),
    )


CASES = st.builds(
    draw_case,
    st.integers(0, 10**6),
    st.integers(1, 4),
    st.integers(3, 14),
    st.integers(3, 14),
    st.integers(1, 3),
    st.sampled_from([1e-3, 1.0, 30.0]),
    st.booleans(),
)
ONE = draw_case(seed=5, count=4, out=12, width=9, rank=2, size=0.3, are_tokens=False)


def run(method: Method, case: Case, strength: float) -> dict[str, Factors]:
    """What whoever runs a method does, without files and models."""
    if isinstance(method, FactorsMethod):
        return method.repair(case.modules, strength)
    if isinstance(method, DirectionsMethod):
        return method.repair(case.modules, case.directions, strength)
    if isinstance(method, DisplacementMethod):
        seen = {module.name: method.observe(module, case.displacements[module.name]) for module in case.modules}
        return method.repair(case.modules, seen, strength)
    return solver_of(method, case)(case.modules, case.moments, 1.0, strength)


def solver_of(method: Method, case: Case) -> Solver:
    """What solves the modules that read one input."""
    if isinstance(method, ConfinedMethod):
        return method.solver({name: found.right for name, found in case.directions.items()})
    assert isinstance(method, MomentsMethod)
    return method.solve


def dense(factors: Factors) -> Tensor:
    return factors.scale * factors.lora_b.double() @ factors.lora_a.double()


def update(module: Site) -> Tensor:
    return dense(Factors.of(module))


def close(got: Tensor, want: Tensor, tolerance: float = 1e-5, size: float | None = None) -> bool:
    """Whether the difference is small beside `want`, or beside a given size: that of what cancels in it."""
    return float((got - want).norm()) <= tolerance * (float(want.norm()) if size is None else size)


def cosine(left: Tensor, right: Tensor) -> float:
    return float((left * right).sum() / (left.norm() * right.norm()))


# The registry


def test_every_file_with_methods_is_registered_and_every_name_is_its_own() -> None:
    found = []
    for entry in pkgutil.iter_modules(methods.__path__):
        module = import_module(f"csulora_cli.methods.{entry.name}")
        if entry.name != "method":
            assert module.METHODS, entry.name
            found += module.METHODS
    assert sorted(method.name for method in found) == sorted(REGISTRY)
    assert all(REGISTRY[method.name] is method for method in found)


def test_the_registry_holds_the_field() -> None:
    assert list(REGISTRY) == [
        "prompts", "keep-out", "keep-out-protect", "keep-in",
        "safelora-threshold", "safelora-number", "safelora-projector", "lssf", "resta", "s3lora",
        "shrink", "random-keep-in", "random-keep-out", "rotated", "harmful", "benign",
    ]  # fmt: skip
    assert {method.family for method in REGISTRY.values()} == set(Family)


@pytest.mark.parametrize("method", REGISTRY.values(), ids=list(REGISTRY))
def test_every_method_fits_its_row_and_says_where_it_comes_from(method: Method) -> None:
    assert len(method.name) <= 18
    assert 0 < len(method.summary) <= 54
    function = solver_of(method, ONE) if methods.needs_moments(method) else method.repair  # type: ignore[attr-defined]
    home = import_module(function.__module__)
    assert home.__doc__
    if method.family is Family.PEER:
        assert "arXiv" in home.__doc__


@pytest.mark.parametrize("method", REGISTRY.values(), ids=list(REGISTRY))
def test_strengths_ascend_and_hold_the_recommended_one(method: Method) -> None:
    for points in (1, 2, 3, 5, 8):
        strengths = method.strengths(points, 28)
        assert len(strengths) == points
        assert list(strengths) == sorted(set(strengths))
        assert strengths[0] > 0
        assert method.default is None or method.default in strengths


@pytest.mark.parametrize("method", REGISTRY.values(), ids=list(REGISTRY))
def test_strength_zero_gives_the_adapter_back(method: Method) -> None:
    for name, factors in run(method, ONE, 0.0).items():
        module = next(module for module in ONE.modules if module.name == name)
        assert torch.equal(factors.lora_a, module.lora_a)
        assert torch.equal(factors.lora_b, module.lora_b)
        assert factors.scale == module.scale


@pytest.mark.parametrize("method", REGISTRY.values(), ids=list(REGISTRY))
def test_every_method_answers_for_every_module_leaves_its_input_alone_and_repeats_itself(method: Method) -> None:
    before = [(module.lora_a.clone(), module.lora_b.clone()) for module in ONE.modules]
    strength = method.strengths(3, len(ONE.modules))[-1]
    first, second = run(method, ONE, strength), run(method, ONE, strength)
    assert set(first) == {module.name for module in ONE.modules}
    for module, (lora_a, lora_b) in zip(ONE.modules, before, strict=True):
        assert torch.equal(module.lora_a, lora_a)
        assert torch.equal(module.lora_b, lora_b)
        assert torch.equal(first[module.name].lora_a, second[module.name].lora_a)
        assert torch.equal(first[module.name].lora_b, second[module.name].lora_b)
        assert not close(dense(first[module.name]), update(module))  # the strongest point changes every module


@pytest.mark.parametrize("method", REGISTRY.values(), ids=list(REGISTRY))
def test_a_zero_update_breaks_no_method(method: Method) -> None:
    empty = replace(ONE, modules=tuple(replace(m, lora_b=torch.zeros_like(m.lora_b)) for m in ONE.modules))
    for strength in method.strengths(3, 4):
        for factors in run(method, empty, strength).values():
            assert bool(torch.isfinite(dense(factors)).all())


@pytest.mark.parametrize("name", [name for name, method in REGISTRY.items() if method.keeps_blocks])
def test_what_a_convolution_with_groups_leaves_out_of_b_stays_zero(name: str) -> None:
    between = torch.block_diag(torch.ones(6, 1), torch.ones(6, 1)) == 0  # of two groups
    case = replace(
        ONE,
        modules=tuple(replace(module, lora_b=module.lora_b.masked_fill(between, 0)) for module in ONE.modules),
        displacements={
            module: torch.block_diag(dense[:6, :4], dense[6:, 4:]) for module, dense in ONE.displacements.items()
        },
    )
    method = REGISTRY[name]
    for strength in method.strengths(3, len(case.modules)):
        for factors in run(method, case, strength).values():
            assert factors.lora_b.shape == between.shape
            assert not factors.lora_b[between].any()


@pytest.mark.parametrize("name", [name for name, method in REGISTRY.items() if methods.needs_displacement(method)])
def test_a_module_whose_weights_are_equal_stays_as_it_is(name: str) -> None:
    same, moved = ONE.modules[0].name, ONE.modules[1].name
    case = replace(ONE, displacements={**ONE.displacements, same: torch.zeros_like(ONE.displacements[same])})
    method = REGISTRY[name]
    repaired = run(method, case, method.strengths(3, len(ONE.modules))[-1])
    assert torch.equal(dense(repaired[same]), update(ONE.modules[0]))
    assert not close(dense(repaired[moved]), update(ONE.modules[1]))


def test_methods_are_chosen_by_name_and_by_what_they_need() -> None:
    everything = choose(None, has_unaligned=True)
    assert [method.name for method in everything.methods] == list(REGISTRY)
    assert everything.left_out == {}
    without = choose(None, has_unaligned=False)
    controls = ["shrink", "rotated", "harmful", "benign"]
    assert [method.name for method in without.methods] == ["prompts", "s3lora", *controls]
    assert without.left_out == {
        name: "needs the unaligned checkpoint" for name in REGISTRY if methods.needs_displacement(REGISTRY[name])
    }
    named = choose(("shrink", "prompts"), has_unaligned=False)
    assert [method.name for method in named.methods] == ["prompts", "shrink"]
    assert named.left_out == {}
    grouped = choose(None, has_unaligned=True, has_groups=True)
    assert set(grouped.left_out) == {"keep-in", "safelora-projector", "lssf", "resta", "random-keep-in"}
    with pytest.raises(UsageError, match="names nonsense"):
        choose(("prompts", "nonsense"), has_unaligned=True)
    blind = choose(None, has_unaligned=True, to_prompts="cannot be run")
    assert set(blind.left_out) == {"prompts", "keep-out-protect", "rotated", "harmful", "benign"}
    with pytest.raises(UsageError, match="keep-out needs the unaligned"):
        choose(("keep-out",), has_unaligned=False)
    with pytest.raises(UsageError, match="lssf makes a lora_B"):
        choose(("prompts", "lssf"), has_unaligned=True, has_groups=True)


def test_grids() -> None:
    assert logarithmic(1, 256)(5, 9) == (1, 4, 16, 64, 256)
    assert logarithmic(1, 256)(1, 9) == (16,)
    assert linear(0.2, 1)(5, 9) == (0.2, 0.4, 0.6, 0.8, 1)
    assert counts(4, 10) == (3, 5, 8, 10)
    assert counts(5, 2) == (1, 2)
    assert REGISTRY["safelora-threshold"].strengths(3, 9) == (0.2, 0.5, 1)
    assert REGISTRY["safelora-number"].strengths(4, 8) == (2, 4, 6, 8)  # 10 are more than there are
    assert REGISTRY["safelora-number"].strengths(4, 28) == (10, 14, 21, 28)  # 10 is nearest to 7


# Peers


@QUICK
@given(CASES)
def test_safelora_as_published(case: Case) -> None:
    number = len(case.modules) // 2 + 1
    want, cosines = {}, {}
    for module in case.modules:
        d = case.displacements[module.name]
        projected = d @ d.mT / d.norm() @ update(module)
        cosines[module.name] = cosine(projected, update(module))
        want[module.name] = projected
    for method, chosen in (
        ("safelora-threshold", {name for name, value in cosines.items() if value <= 0.5}),
        ("safelora-number", set(sorted(cosines, key=lambda name: cosines[name])[:number])),
    ):
        repaired = run(REGISTRY[method], case, 0.5 if method == "safelora-threshold" else number)
        for module in case.modules:
            expected = want[module.name] if module.name in chosen else update(module)
            assert close(dense(repaired[module.name]), expected), method


def test_the_published_matrix_is_no_projector_and_changes_the_size_of_what_it_keeps() -> None:
    module, d = ONE.modules[0], ONE.displacements[ONE.modules[0].name]
    small = safelora.observe(module, d)
    large = safelora.observe(module, 10 * d)
    assert close(large.lora_b.double(), 10 * small.lora_b.double())
    assert large.cosine == pytest.approx(small.cosine)


@QUICK
@given(CASES)
def test_safelora_with_a_projector(case: Case) -> None:
    repaired = run(REGISTRY["safelora-projector"], case, 0.8)
    for module in case.modules:
        left = leading_directions(case.displacements[module.name], ENERGY).left
        projected = left @ left.mT @ update(module)
        is_kept = cosine(projected, update(module)) > 0.8
        want = update(module) if is_kept else projected
        assert close(dense(repaired[module.name]), want, size=float(update(module).norm()))


def test_a_projector_applied_twice_changes_nothing_more() -> None:
    module = ONE.modules[0]
    directions = ONE.directions[module.name]
    once = safelora_projector.project(module, directions)
    again = safelora_projector.project(replace(module, lora_b=once.lora_b), directions)
    assert close(again.lora_b.double(), once.lora_b.double())
    assert again.cosine == pytest.approx(1, abs=1e-6)
    assert once.cosine < 0.999


@QUICK
@given(CASES, st.sampled_from([0.25, 1.0, 3.0]))
def test_lssf_adds_the_leading_part_of_the_displacement(case: Case, strength: float) -> None:
    repaired = run(REGISTRY["lssf"], case, strength)
    for module in case.modules:
        d = case.displacements[module.name]
        u, sigma, _ = torch.linalg.svd(d, full_matrices=False)
        shares = sigma.square() / sigma.square().sum()
        entropy = [-float((shares[: rho + 1] * shares[: rho + 1].log()).sum()) for rho in range(len(shares))]
        rank = next(rho + 1 for rho, value in enumerate(entropy) if value >= 0.8 * entropy[-1] * (1 - 1e-9))
        projector = u[:, :rank] @ u[:, :rank].mT
        assert close(dense(repaired[module.name]), update(module) + strength * projector @ d)
        assert repaired[module.name].lora_a.shape[0] == module.rank + rank


def test_entropy_rank_by_hand() -> None:
    equal = torch.ones(10)
    assert lssf.entropy_rank(equal, 0.8) == 8
    assert lssf.entropy_rank(equal, 1.0) == 10
    assert lssf.entropy_rank(torch.tensor([3.0, 0.0, 0.0]), 0.8) == 1
    assert lssf.entropy_rank(torch.zeros(4), 0.8) == 0
    # p = (0.8, 0.2): −0.8 log 0.8 = 0.1785 of 0.5004, so one direction holds 36 % of the entropy
    uneven = torch.tensor([2.0, 1.0])
    assert (lssf.entropy_rank(uneven, 0.35), lssf.entropy_rank(uneven, 0.37)) == (1, 2)


@QUICK
@given(CASES, st.sampled_from([0.25, 1.0, 3.0]))
def test_resta_adds_the_displacement_up_to_its_held_energy(case: Case, strength: float) -> None:
    repaired = run(REGISTRY["resta"], case, strength)
    for module in case.modules:
        d = case.displacements[module.name]
        u, sigma, vt = torch.linalg.svd(d, full_matrices=False)
        rank = repaired[module.name].lora_a.shape[0] - module.rank
        added = strength * u[:, :rank] * sigma[:rank] @ vt[:rank]
        assert close(dense(repaired[module.name]), update(module) + added)
        assert float(sigma[:rank].square().sum()) >= ENERGY * float(sigma.square().sum()) * (1 - 1e-9)


@QUICK
@given(CASES)
def test_s3lora_empties_the_sharpest_modules(case: Case) -> None:
    number = len(case.modules) // 2 + 1
    sharpness = {}
    for module in case.modules:
        sigma = torch.linalg.svdvals(update(module))
        sharpness[module.name] = float(sigma[0] / sigma.sum())
        assert s3lora.sharpness(module) == pytest.approx(sharpness[module.name], rel=1e-6)
    chosen = set(sorted(sharpness, key=lambda name: -sharpness[name])[:number])
    repaired = run(REGISTRY["s3lora"], case, number)
    for module in case.modules:
        expected = torch.zeros_like(update(module)) if module.name in chosen else update(module)
        # modules of rank one are all equally sharp: then the names decide, and rounding does not
        assert module.rank == 1 or torch.equal(dense(repaired[module.name]), expected)
    assert sum(not dense(repaired[module.name]).any() for module in case.modules) == number


# csulora's own


@QUICK
@given(CASES, st.sampled_from([0.5, 4.0, 64.0]))
def test_prompts_is_the_closed_form(case: Case, strength: float) -> None:
    repaired = run(REGISTRY["prompts"], case, strength)
    for module in case.modules:
        assert close(dense(repaired[module.name]), oracle.fade(update(module), *case.dense_moments, 1.0, strength))


@QUICK
@given(CASES, st.sampled_from([0.5, 4.0, 64.0]))
def test_keep_out_fades_on_the_leading_directions(case: Case, strength: float) -> None:
    repaired = run(REGISTRY["keep-out"], case, strength)
    for module in case.modules:
        d, found = case.displacements[module.name], case.directions[module.name]
        kept = d @ found.right.double() @ found.right.double().mT
        penalty = kept.mT @ kept * d.shape[1] / d.square().sum()
        want = update(module) @ torch.linalg.inv(torch.eye(d.shape[1], dtype=torch.float64) + strength * penalty)
        assert close(dense(repaired[module.name]), want)


@QUICK
@given(CASES, st.sampled_from([0.5, 4.0, 64.0]))
def test_keep_out_that_protects_fades_along_the_leading_directions(case: Case, strength: float) -> None:
    repaired = run(REGISTRY["keep-out-protect"], case, strength)
    for module in case.modules:
        basis = case.directions[module.name].right.double()
        want = oracle.fade_along(basis, update(module), *case.dense_moments, 1.0, strength)
        assert close(dense(repaired[module.name]), want, size=float(update(module).norm()))


@pytest.mark.parametrize(
    ("kind", "form", "tokens", "k"),
    [
        (Kind.LINEAR, Form.MOMENT, 500, 12), (Kind.LINEAR, Form.TOKENS, 30, 9), (Kind.LINEAR, Form.TOKENS, 30, 40),
        (Kind.EMBEDDING, Form.DIAGONAL, 30, 12),
    ],
)  # fmt: skip
def test_moments_along_directions_take_the_memory_that_is_counted(kind: Kind, form: Form, tokens: int, k: int) -> None:
    group = InputGroup(("a", "b"), 64, Place("a", kind))
    shape = {Form.MOMENT: (64, 64), Form.TOKENS: (64, tokens // 2), Form.DIAGONAL: (64,)}[form]
    moments = Moments(torch.ones(shape, dtype=torch.float64), torch.ones(shape, dtype=torch.float64), form)
    held = 0
    for name in group.members:
        along = moments.along(name, torch.eye(64)[:, :k])
        held += 8 * (along.faded.numel() + along.benign.numel())
        held += 0 if along.form is Form.TOKENS else 8 * along.shared(0.0)[1].numel()
    bases = {name: torch.zeros(64, k) for name in group.members}
    assert Confined(bases).own_bytes([group], (tokens // 2, tokens // 2)) == held


def test_keep_in_keeps_the_rank_and_approaches_the_two_sided_projection() -> None:
    repaired = run(REGISTRY["keep-in"], ONE, 1e9)
    for module in ONE.modules:
        found = ONE.directions[module.name]
        left, right = found.left.double(), found.right.double()
        assert close(dense(repaired[module.name]), left @ left.mT @ update(module) @ right @ right.mT)
        assert repaired[module.name].lora_a.shape == module.lora_a.shape


# Controls


@QUICK
@given(CASES, st.sampled_from([0.1, 1.0, 9.0]))
def test_shrink_divides(case: Case, strength: float) -> None:
    for module in case.modules:
        repaired = run(REGISTRY["shrink"], case, strength)[module.name]
        assert close(dense(repaired), update(module) / (1 + strength))


def test_random_directions_are_as_many_orthonormal_and_others() -> None:
    for module in ONE.modules:
        own = ONE.directions[module.name]
        drawn = random_subspace.randomised(module.name, own)
        assert drawn.rank == own.rank
        assert torch.equal(drawn.singular_values, own.singular_values)
        assert drawn.squared_total == own.squared_total
        for basis, original in ((drawn.left, own.left), (drawn.right, own.right)):
            assert basis.shape == original.shape
            assert close(basis.mT.double() @ basis.double(), torch.eye(own.rank, dtype=torch.float64))
            overlap = float((basis.double().mT @ original.double()).square().sum()) / own.rank
            assert overlap < 0.95  # 1 would be the same subspace
    assert not close(
        random_subspace.randomised("a", own).left.double(), random_subspace.randomised("b", own).left.double()
    )


@pytest.mark.parametrize("name", ["keep-in", "keep-out"])
def test_a_random_subspace_is_the_method_itself_on_other_directions(name: str) -> None:
    drawn = {name: random_subspace.randomised(name, entry) for name, entry in ONE.directions.items()}
    control, own = REGISTRY[f"random-{name}"], REGISTRY[name]
    assert isinstance(control, DirectionsMethod)
    assert isinstance(own, DirectionsMethod)
    want = own.repair(ONE.modules, drawn, 4.0)
    got = control.repair(ONE.modules, ONE.directions, 4.0)
    for module in ONE.modules:
        assert torch.equal(dense(got[module.name]), dense(want[module.name]))
        assert not close(dense(got[module.name]), dense(run(own, ONE, 4.0)[module.name]), 1e-2)


@QUICK
@given(CASES)
def test_a_rotation_keeps_the_spectrum_and_turns_the_directions(case: Case) -> None:
    moments = case.moments
    turned = rotated.rotated(moments, "layers.0.proj")
    assert torch.equal(turned.benign, moments.benign)
    before, after = moments.faded, turned.faded
    assert after.shape == before.shape
    if moments.form is Form.TOKENS:
        assert close(after.mT @ after, before.mT @ before, 1e-9)
        before, after = before @ before.mT, after @ after.mT
    assert close(torch.linalg.eigvalsh(after), torch.linalg.eigvalsh(before), 1e-9)
    assert not close(after, before, 1e-2)


def test_controls_are_the_prompts_method_on_other_prompts_if_these_are_others() -> None:
    told_apart, harm_alone = Prompts(("h",), ("l",), ("g",)), Prompts(("h",), ("l",), ())
    own = REGISTRY["prompts"]
    assert isinstance(own, MomentsMethod)
    assert own.fades_on(told_apart) == ("l",)
    for name, prompts in (("harmful", ("h",)), ("benign", ("g",))):
        control = REGISTRY[name]
        assert isinstance(control, MomentsMethod)
        assert control.solve is own.solve
        assert control.fades_on(told_apart) == prompts
    assert "harmful" not in choose(None, has_unaligned=True, directions=told_apart).left_out
    assert choose(None, has_unaligned=True, directions=harm_alone).left_out == {
        "harmful": "fades on the same prompts as prompts does"
    }
    with pytest.raises(UsageError, match="the method harmful fades on the same prompts"):
        choose(("harmful",), has_unaligned=True, directions=harm_alone)


def test_a_random_basis_is_uniform_in_sign_and_depends_on_the_name() -> None:
    draws = torch.stack([random_basis(3, 2, seeded(f"m{index}")) for index in range(400)])
    assert draws.mean(0).abs().max() < 0.12  # without the sign of R's diagonal the first entry would lean
    assert torch.equal(random_basis(3, 2, seeded("m0")), draws[0])
    assert math.isclose(float(draws[0].mT.flatten() @ draws[0].mT.flatten()), 2, rel_tol=1e-9)
