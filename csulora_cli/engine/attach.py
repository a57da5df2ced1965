"""How a site joins a loaded model: seeing what it reads, and applying an update to it without changing the model.

Linear layers, embeddings and convolutions are modules, so that hooks see their inputs and add to their outputs. A
parameter (experts, a router) is multiplied somewhere inside its module's forward: the products are intercepted and told
apart by the memory that their operand lies in, and an update is applied by putting another parameter in its place. No
architecture is named.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from csulora_cli.adapter import Adapter
from csulora_cli.errors import HostError
from csulora_cli.formats.carried import Carried
from csulora_cli.formats.site import Kind, Place, Site
from csulora_cli.formats.structure import is_packed, structure_of
from csulora_cli.text import printable


@dataclass(frozen=True)
class Factors:
    """The factors of one site as they are applied: y += scale · (B A x + b).

    Attributes:
        lora_a, lora_b: A (r, in) and B (out, r).
        scale: s.
        bias: b, (out,), or None.
        gain: of DoRA, (out,), or None: what the layer gives without its own bias is multiplied by it. B is already.
        place: where they are applied; None means the module of the site's name.
    """

    lora_a: Tensor
    lora_b: Tensor
    scale: float
    bias: Tensor | None = None
    place: Place | None = None
    gain: Tensor | None = None

    @classmethod
    def of(cls, site: Site) -> "Factors":
        """The factors of a site as stored."""
        return cls(site.lora_a, site.lora_b, site.scale, site.bias, site.place, site.gain)


def unchanged(sites: Iterable[Site]) -> dict[str, Factors]:
    """The factors of sites as stored, by name."""
    return {site.name: Factors.of(site) for site in sites}


@dataclass(frozen=True)
class Update:
    """What an adapter does to the host; empty, it is the host alone.

    Attributes:
        factors: of its low-rank updates, by name of the site.
        carried: what it puts in the place of the host's weights.
    """

    factors: Mapping[str, Factors] = field(default_factory=dict)
    carried: Sequence[Carried] = ()

    @classmethod
    def of(cls, adapter: Adapter) -> "Update":
        """An adapter as stored."""
        return cls(unchanged(adapter.sites), adapter.carried)

    def repaired(self, factors: Mapping[str, Factors]) -> "Update":
        """The same adapter with other factors."""
        return replace(self, factors=factors)


@dataclass(frozen=True)
class DenseInputs:
    """Inputs of one batch: rows (N, in), float32, each multiplied by the square root of its token's weight."""

    rows: Tensor

    def to(self, device: torch.device, dtype: torch.dtype) -> "DenseInputs":
        """The same on a device, in another precision."""
        return DenseInputs(self.rows.to(device, dtype))

    def squared_total(self) -> float:
        """Σ‖row‖²."""
        return float(torch.linalg.vector_norm(self.rows, dim=1).cpu().double().square().sum())

    def project(self, lora_a: Tensor) -> Tensor:
        """A x for every row, (N, r), with A (r, in)."""
        return self.rows @ lora_a.mT

    def moment(self) -> Tensor:
        """Σ x xᵀ, (in, in)."""
        return self.rows.mT @ self.rows


@dataclass(frozen=True)
class OneHotInputs:
    """Inputs of an embedding: token ids, (N,), standing for unit vectors, and the square roots of their weights."""

    ids: Tensor
    roots: Tensor
    features: int

    def to(self, device: torch.device, dtype: torch.dtype) -> "OneHotInputs":
        """The same on a device, in another precision."""
        return replace(self, ids=self.ids.to(device), roots=self.roots.to(device, dtype))

    def squared_total(self) -> float:
        """Σ‖row‖²."""
        return float(self.roots.cpu().double().square().sum())

    def project(self, lora_a: Tensor) -> Tensor:
        """A x for every token, (N, r): the columns of A that it picks."""
        return lora_a.mT[self.ids] * self.roots[:, None]

    def moment(self) -> Tensor:
        """The diagonal of Σ x xᵀ, (in,); all else is zero."""
        return self.roots.new_zeros(self.features).index_add(0, self.ids, self.roots.square())


Inputs = DenseInputs | OneHotInputs
Take = Callable[[str, Inputs], None]


@contextmanager
def watching(model: nn.Module, places: Mapping[str, Place], sides: Sequence[Tensor], take: Take) -> Iterator[None]:
    """While this is open, a forward pass (one, if there are two sides) hands the inputs of some sites to `take`.

    Args:
        model: the host.
        places: the sites by name.
        sides: how often each token of the batch counts, (B, T); tokens of weight 0 are left out. One tensor, or two of
            different widths for what the encoder and the decoder read. A module's input is of the side whose shape it
            has: cross-attention reads tokens of the encoder.
        take: receives a site's name and its inputs, in the order of execution; a site of a parameter that is used
            several times comes as often.

    Raises:
        HostError: where, or while it is open, inputs cannot be told to belong to tokens.
    """
    if len(sides) > 1:
        _check_two_sided(places)
        take = _once(places, take)
    products = _Products(model, {name: place for name, place in places.items() if place.kind is Kind.PARAMETER},
                         sides[0], take)  # fmt: skip
    with ExitStack() as stack:
        for name, place in places.items():
            if place.kind is not Kind.PARAMETER:
                hook = _input_hook(name, place, sides, take)
                module = model.get_submodule(place.module)
                stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        if products.is_needed:
            stack.enter_context(products.watching())
        yield


def _check_two_sided(places: Mapping[str, Place]) -> None:
    """Refuse what is told to read tokens by other means than the shape of its input."""
    for place in places.values():
        if place.kind in (Kind.PARAMETER, Kind.CONVOLUTION):
            what = "a parameter" if place.kind is Kind.PARAMETER else "a convolution"
            raise HostError(
                f"'{printable(place.weight)}' is {what} of an encoder-decoder model: what it reads of which token "
                "cannot be told",
                "The prompts source cannot repair it; use --unaligned without --protect.",
            )


def _once(places: Mapping[str, Place], take: Take) -> Take:
    """`take`, for sites that run once: one that runs for both sides, or on something else as well, is refused."""
    seen: set[str] = set()

    def taking(name: str, inputs: Inputs) -> None:
        if name in seen:
            raise HostError(
                f"'{printable(places[name].module)}' runs several times on one prompt, which csulora cannot follow in "
                "an encoder-decoder model",
                "The prompts source cannot repair this module; use --unaligned without --protect.",
            )
        seen.add(name)
        take(name, inputs)

    return taking


@contextmanager
def checking_lookups(model: nn.Module, places: Iterable[Place]) -> Iterator[None]:
    """While this is open, embeddings must give the rows of their tables that they are called with.

    One that finds out positions by itself does not: its update, which is looked up by what it is called with, would be
    of other rows.

    Raises:
        HostError: while it is open, where one does not.
    """

    def check(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        ids = first_argument(args, kwargs)
        is_lookup = not ids.is_floating_point() and int(ids.max()) < len(module.weight)
        if is_lookup:
            rows = functional.embedding(ids, module.weight) * getattr(module, "embed_scale", 1.0)
            is_lookup = rows.shape == output.shape and torch.allclose(rows, output, rtol=1e-2, atol=1e-4)
        if not is_lookup:
            raise HostError(
                f"'{printable(names[module])}' is an embedding of something else than what it is called with",
                "The prompts source cannot repair this module; use --unaligned without --protect.",
            )

    names = {submodule(model, place.module): place.module for place in places if place.kind is Kind.EMBEDDING}
    with ExitStack() as stack:
        for module in names:
            stack.callback(module.register_forward_hook(check, with_kwargs=True).remove)
        yield


def first_argument(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """What a module is called with, by position or by name."""
    value: Tensor = args[0] if args else next(iter(kwargs.values()))
    return value


def _input_hook(
    name: str, place: Place, sides: Sequence[Tensor], take: Take
) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = first_argument(args, kwargs)
        if place.kind is Kind.EMBEDDING:
            ids, roots = _weighted(place, inputs.flatten(), _side_of(place, inputs.shape, sides))
            take(name, OneHotInputs(ids, roots, module.get_parameter("weight").shape[0]))
            return
        if place.kind is Kind.CONVOLUTION:
            inputs = _patches(module, inputs, place, sides[0])
        rows, roots = _weighted(place, inputs.flatten(0, -2), _side_of(place, inputs.shape[:-1], sides))
        take(name, DenseInputs(rows.float() * roots[:, None]))

    return hook


def _side_of(place: Place, shape: torch.Size, sides: Sequence[Tensor]) -> Tensor:
    """The side whose tokens a module reads, in an encoder-decoder model by the shape (B, T) of what it reads."""
    if len(sides) == 1:
        return sides[0]
    found = next((side for side in sides if side.shape == shape), None)
    if found is None:
        wanted = " or ".join(str(tuple(side.shape)) for side in sides)
        raise HostError(
            f"'{printable(place.module)}' reads an input of shape {tuple(shape)} where the tokens have {wanted}: what "
            "it reads of which token cannot be told",
            "The prompts source cannot repair this module; use --unaligned without --protect.",
        )
    return found


def _weighted(place: Place, rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Rows that count and the square roots of their weights; one row a token of the batch."""
    counts = weights.flatten().to(rows.device)
    if len(rows) != len(counts):
        raise HostError(
            f"'{printable(place.module)}' reads {len(rows)} rows where the batch has {len(counts)} tokens: what it "
            "reads of which token cannot be told",
            "The prompts source cannot repair this module; use --unaligned without --protect.",
        )
    keep = counts > 0
    return rows[keep], counts[keep].sqrt()


def _patches(module: Any, inputs: Tensor, place: Place, weights: Tensor) -> Tensor:
    """What a one-dimensional convolution over the tokens reads for each token, (B, T, in·kernel)."""
    batch, tokens = weights.shape
    if inputs.ndim != 3 or inputs.shape[0] != batch or inputs.shape[2] != tokens or module.stride[0] != 1:
        raise HostError(
            f"'{printable(place.module)}' is a convolution that does not run along the tokens",
            "The prompts source cannot repair this module; use --unaligned without --protect.",
        )
    padded = functional.pad(inputs, module._reversed_padding_repeated_twice)
    windows = padded.unfold(2, module.kernel_size[0], 1)  # (B, in, T', kernel)
    if windows.shape[2] < tokens:
        raise HostError(
            f"'{printable(place.module)}' is a convolution that gives fewer outputs than there are tokens",
            "The prompts source cannot repair this module; use --unaligned without --protect.",
        )
    return windows[:, :, :tokens].movedim(1, 2).flatten(2)


# Products with a weight, the place of the weight among the arguments, and which of its dimensions is summed over.
_PRODUCTS: dict[Any, tuple[int, int]] = {
    functional.linear: (1, -1),
    torch.matmul: (1, -2),
    Tensor.matmul: (1, -2),
    Tensor.__matmul__: (1, -2),
    torch.mm: (1, -2),
    Tensor.mm: (1, -2),
    torch.bmm: (1, -2),
    Tensor.bmm: (1, -2),
}


class _Products(TorchFunctionMode):
    """Sees products of activations with watched parameters, or with one expert's part of them.

    Which rows of a product are which tokens: all of them in order, or what the module picked from them last with a list
    of row numbers.
    """

    def __init__(self, model: nn.Module, places: Mapping[str, Place], weights: Tensor, take: Take) -> None:
        super().__init__()
        self.places = places
        self.weights = weights.flatten()
        self.take = take
        self.rows: Tensor | None = None
        self.running: nn.Module | None = None
        self.owners = {place.module: model.get_submodule(place.module) for place in places.values()}
        self.names = {(place.weight, place.expert): name for name, place in places.items()}
        self.parameters = {place.weight: self.owners[place.module].get_parameter(place.parameter)
                           for place in places.values()}  # fmt: skip

    @property
    def is_needed(self) -> bool:
        """Whether there is anything to watch."""
        return bool(self.places)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch, and forget at the start of each module what was picked in another one."""

        def begin(module: nn.Module, _args: Any) -> None:
            self.rows, self.running = None, module

        with ExitStack() as stack:
            for module in self.owners.values():
                stack.callback(module.register_forward_pre_hook(begin).remove)
            stack.enter_context(self)
            yield

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.__getitem__ and _picks_rows(args, len(self.weights)):
            self.rows = args[1]
        elif func in _PRODUCTS and len(args) > 1 and isinstance(args[1], Tensor):
            place, dimension = _PRODUCTS[func]
            self._note(args[0], args[place], dimension)
        return func(*args, **(kwargs or {}))

    def _note(self, inputs: Tensor, operand: Tensor, dimension: int) -> None:
        for weight in self._weights_at(operand.untyped_storage().data_ptr()):
            parameter = self.parameters[weight]
            is_whole = operand.numel() == parameter.numel() and parameter.ndim == 3
            experts = range(parameter.shape[0]) if is_whole else [_expert(operand, parameter)]
            for expert in experts:
                name = self.names.get((weight, expert))
                if name is not None:
                    self._check_side(self.places[name], parameter, operand.stride(dimension))
                    self._hand_over(name, inputs[expert] if is_whole else inputs)

    def _weights_at(self, address: int) -> list[str]:
        """The watched parameters that lie there; where modules share one, that of the module that runs."""
        found = [name for name, own in self.parameters.items() if own.untyped_storage().data_ptr() == address]
        if len(found) < 2:
            return found
        return [name for name in found if self.owners[name.rpartition(".")[0]] is self.running]

    def _check_side(self, place: Place, parameter: Tensor, summed_stride: int) -> None:
        """The product must sum over the dimension that A reads."""
        wanted = parameter.stride(-2 if place.is_transposed else -1)
        if summed_stride != wanted and parameter.shape[-1] != 1 and parameter.shape[-2] != 1:
            raise HostError(
                f"'{printable(place.weight)}' is multiplied from the side that lora_B stands on",
                "The module does not say that it stores its experts transposed; csulora cannot repair it.",
            )

    def _hand_over(self, name: str, inputs: Tensor) -> None:
        rows = inputs.reshape(-1, inputs.shape[-1])
        counts = self.weights.to(rows.device)
        if self.rows is not None and len(self.rows) == len(rows):
            counts = counts[self.rows]
        elif len(rows) != len(counts):
            raise HostError(
                f"which tokens '{printable(self.places[name].weight)}' reads cannot be told",
                "The prompts source cannot repair this parameter; use --unaligned without --protect.",
            )
        keep = counts > 0
        self.take(name, DenseInputs(rows[keep].float() * counts[keep].sqrt()[:, None]))


def _picks_rows(args: Sequence[Any], tokens: int) -> bool:
    """Whether an indexing takes rows of something with one row a token, by a list of their numbers."""
    source, index = args
    is_list = isinstance(index, Tensor) and index.ndim == 1 and index.dtype is torch.int64
    return is_list and source.ndim == 2 and len(source) == tokens


def _expert(operand: Tensor, parameter: Tensor) -> int | None:
    """Which part of a parameter (experts, ·, ·) an operand is, or None for a parameter of two dimensions."""
    if parameter.ndim == 2:
        return None
    return (operand.storage_offset() - parameter.storage_offset()) // parameter.stride(0)


@contextmanager
def applied(model: nn.Module, update: Update) -> Iterator[None]:
    """Run the model with an adapter: y += scale · (B A x + b) on each site, computed as PEFT does, in float32.

    Args:
        model: the host; as it was when this closes.
        update: the adapter.

    Raises:
        HostError: the host has no such module.
    """
    device = next(model.parameters()).device
    by_parameter: dict[str, list[tuple[Place, Factors]]] = {}
    with ExitStack() as stack:
        if update.carried:
            stack.enter_context(_carrying(model, update.carried))
        for name, own in update.factors.items():
            place = own.place or Place(name)
            module = submodule(model, place.module)
            if place.kind is Kind.PARAMETER:
                by_parameter.setdefault(place.weight, []).append((place, own))
                continue
            hook = _update_hook(place, own, device)
            stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        for entries in by_parameter.values():
            place = entries[0][0]
            owner = model.get_submodule(place.module)
            _check_not_packed(owner, place.weight)
            updated = _updated_parameter(owner.get_parameter(place.parameter), entries)
            stack.enter_context(_replaced(owner, place.parameter, updated))
        yield


def submodule(model: nn.Module, name: str) -> nn.Module:
    """A module by name.

    Raises:
        HostError: no such module.
    """
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise HostError(
            f"the host has no module '{printable(name)}'", "Give the model that the adapter was trained on."
        ) from None


def weight_of(model: nn.Module, place: Place) -> Tensor:
    """The weight of a site in a loaded model, as (out, in) in float32.

    Raises:
        HostError: no such module, or its weight is packed.
    """
    module = submodule(model, place.module)
    _check_not_packed(module, place.weight)
    weight = module.get_parameter(place.parameter).detach().float()
    weight = weight if place.expert is None else weight[place.expert]
    is_swapped = place.is_transposed or place.kind is Kind.EMBEDDING or type(module).__name__ == "Conv1D"
    return weight.mT if is_swapped else weight.flatten(1)


def _check_not_packed(module: nn.Module, name: str) -> None:
    """Refuse a weight that a quantised layer keeps in another form than numbers (out, in)."""
    if is_packed(module):
        raise HostError(
            f"the adapter needs or replaces '{printable(name)}', which is quantised in the host",
            "Give the full-precision model that it was made from.",
        )


def is_copy(model: nn.Module, entry: Carried) -> bool:
    """Whether a carried tensor holds what the model has in its place, in the model's dtype."""
    if entry.weight is None:
        return False
    module, _, name = entry.weight.rpartition(".")
    own = submodule(model, module).get_parameter(name).detach()
    own = own if entry.rows is None else own[list(entry.rows)]
    return torch.equal(entry.tensor.to(own.device, own.dtype), own)


@contextmanager
def _carrying(model: nn.Module, carried: Sequence[Carried]) -> Iterator[None]:
    """Run the model with an adapter's full replacements of weights, each in one module, as PEFT does.

    Trained rows of an embedding reach the modules that share its weight, too.
    """
    ties = structure_of(model).ties
    with ExitStack() as stack:
        for entry in carried:
            if entry.weight is None:
                continue
            others = ties.get(entry.weight, ()) if entry.rows is not None else ()
            for weight in (entry.weight, *others):
                module, _, name = weight.rpartition(".")
                owner = model.get_submodule(module)
                _check_not_packed(owner, weight)
                former = owner.get_parameter(name)
                value = entry.tensor.to(former.device, former.dtype)
                if entry.rows is not None:
                    rows = torch.tensor(entry.rows, device=former.device)
                    value = former.detach().index_copy(0, rows, value)
                stack.enter_context(_replaced(owner, name, value))
        yield


@contextmanager
def _replaced(owner: nn.Module, parameter: str, value: Tensor) -> Iterator[None]:
    """Put another tensor in the place of a parameter of one module; what shares the parameter keeps the old one."""
    former = owner._parameters[parameter]
    owner._parameters[parameter] = nn.Parameter(value, requires_grad=False)
    try:
        yield
    finally:
        owner._parameters[parameter] = former


def _updated_parameter(parameter: Tensor, entries: Sequence[tuple[Place, Factors]]) -> Tensor:
    updated = parameter.detach().clone()
    for place, factors in entries:
        lora_a, lora_b = (tensor.to(parameter.device, torch.float32) for tensor in (factors.lora_a, factors.lora_b))
        update = factors.scale * (lora_b @ lora_a)  # (out, in)
        part = updated if place.expert is None else updated[place.expert]
        part += (update.mT if place.is_transposed else update).to(parameter.dtype)
    return updated


_CONVOLUTIONS = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}


def _update_hook(
    place: Place, factors: Factors, device: torch.device
) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Tensor], Tensor]:
    lora_a = factors.lora_a.to(device, torch.float32)
    lora_b = factors.lora_b.to(device, torch.float32)
    bias = None if factors.bias is None else factors.bias.to(device, torch.float32)
    gain = None if factors.gain is None else factors.gain.to(device, torch.float32)

    def on_linear(_module: nn.Module, inputs: Tensor) -> Tensor:
        return functional.linear(functional.linear(inputs.to(torch.float32), lora_a), lora_b, bias)

    def on_embedding(module: nn.Module, ids: Tensor) -> Tensor:
        if ids.is_floating_point():
            raise HostError(
                f"'{printable(place.module)}' is an embedding that is not called with numbers of rows",
                "An update of its rows cannot be run, in PEFT neither.",
            )
        update = functional.embedding(ids, lora_a.mT) @ lora_b.mT
        return update * getattr(module, "embed_scale", 1.0)  # some embeddings scale what they give

    def on_convolution(module: Any, inputs: Tensor) -> Tensor:
        # Zeros around the input, no gaps in the kernel and no groups in A, whatever the layer itself has.
        kernel = lora_a.reshape(len(lora_a), module.in_channels, *module.kernel_size)
        padded = functional.pad(inputs.to(torch.float32), module._reversed_padding_repeated_twice)
        inner = _CONVOLUTIONS[len(module.kernel_size)](padded, kernel, stride=module.stride)
        update = torch.einsum("or,nr...->no...", lora_b, inner)
        return update if bias is None else update + bias.reshape(-1, *[1] * (update.ndim - 2))

    apply = {Kind.LINEAR: on_linear, Kind.EMBEDDING: on_embedding, Kind.CONVOLUTION: on_convolution}[place.kind]

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        update = apply(module, first_argument(args, kwargs)) * factors.scale
        if gain is not None:
            own = output if module.bias is None else output - module.bias
            update = update + (gain - 1) * own.to(torch.float32)
        return output + update.to(output.dtype)

    return hook
