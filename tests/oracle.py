"""The promised updates, computed once more: dense, in float64, one prompt at a time, with nothing of csulora's engine.

The factors and scales of an adapter come from peft, the inputs of its modules from a float64 host without any padding.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Dense:
    """One adapted module: A (r, in), B (out, r), s as peft reads them, and whether the host stores (in, out)."""

    lora_a: Tensor
    lora_b: Tensor
    scale: float
    is_conv1d: bool

    @property
    def update(self) -> Tensor:
        """Δ = s·B·A, (out, in)."""
        return self.scale * self.lora_b @ self.lora_a


def load(host: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The host through transformers, by the class that it was saved from."""
    import transformers

    name = json.loads((host / "config.json").read_text())["architectures"][0]
    kind = getattr(transformers, name, transformers.AutoModelForCausalLM)  # ours is known to the automatic class alone
    return kind.from_pretrained(host, dtype=dtype).eval()


def with_adapter(host: Path, adapter: Path) -> Any:
    """A PeftModel on a fresh host."""
    import peft

    return peft.PeftModel.from_pretrained(load(host), str(adapter)).eval()


def peft_modules(host: Path, adapter: Path) -> dict[str, Dense]:
    """Every adapted module as peft sees it, by the name in the host."""
    found = {}
    for name, layer in with_adapter(host, adapter).base_model.model.named_modules():
        if hasattr(layer, "lora_A"):
            found[name] = Dense(
                layer.lora_A["default"].weight.detach().double(),
                layer.lora_B["default"].weight.detach().double(),
                float(layer.scaling["default"]),
                type(layer.base_layer).__name__ == "Conv1D",
            )
    return found


def merged_updates(host: Path, adapter: Path) -> dict[str, Tensor]:
    """Merged weight − host weight of every adapted module, (out, in), in float64 from float32 weights."""
    names = peft_modules(host, adapter)
    before = load(host)
    after = with_adapter(host, adapter).merge_and_unload()
    updates = {}
    for name, dense in names.items():
        change = after.get_submodule(name).weight.double() - before.get_submodule(name).weight.double()
        updates[name] = (change.mT if dense.is_conv1d else change).detach()
    return updates


def weight_changes(host: Path, adapter: Path) -> dict[str, Tensor]:
    """W' − W of every adapted layer as peft merges it, whatever its kind, (out, in), float64."""
    before, after = load(host), with_adapter(host, adapter).merge_and_unload()
    return {
        name: (after.get_submodule(name).weight.double() - before.get_submodule(name).weight.double()).detach()
        for name, layer in with_adapter(host, adapter).base_model.model.named_modules()
        if hasattr(layer, "lora_A")
    }


def weights(host: Path, modules: Mapping[str, Dense]) -> dict[str, Tensor]:
    """The host's weight of every adapted module as (out, in), float64."""
    model = load(host)
    found = {}
    for name, dense in modules.items():
        weight = model.get_submodule(name).weight.detach().double()
        found[name] = weight.mT if dense.is_conv1d else weight
    return found


def direction_prompts(file: Path) -> dict[str, list[str]]:
    """What the update fades on, what is protected, and what the adapter's answers to alone are.

    Two of every four prompts of each label give directions where a file has neither splits nor categories. Where some
    benign ones are everyday ones, only those are protected, and the update fades on the others: in the place of the
    harmful ones, or beside them where there are less than half as many.
    """
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    chosen = {}
    for label in ("harmful", "benign"):
        own = [line for line in lines if line["label"] == label]
        own.sort(key=lambda line: line.get("kind") == "general")
        is_split = all("split" in line for line in own)
        chosen[label] = [
            line for index, line in enumerate(own) if (line["split"] == "directions" if is_split else index % 4 < 2)
        ]
    everyday = [line for line in chosen["benign"] if line.get("kind") == "general"]
    faded, lookalikes = chosen["harmful"], []
    if everyday:
        lookalikes = [line for line in chosen["benign"] if line.get("kind") != "general"]
        faded = lookalikes if len(lookalikes) >= len(faded) / 2 else faded + lookalikes
    sides = {"faded": faded, "benign": everyday or chosen["benign"], "replies": lookalikes}
    return {side: [line["prompt"] for line in own] for side, own in sides.items()}


def chat_ids(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of one user turn, from transformers."""
    turn = [{"role": "user", "content": prompt}]
    return list(tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=True, return_dict=False))


def prompt_ids(host: Path, prompts: Sequence[str]) -> list[tuple[int, ...]]:
    """Token ids of some prompts."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(host)
    return [tuple(chat_ids(tokenizer, prompt)) for prompt in prompts]


def with_answers(
    host: Path, adapter: Path, token_lists: Sequence[tuple[int, ...]], count: int
) -> list[tuple[int, ...]]:
    """Prompts with the first tokens of PEFT's greedy answers to them, token by token, without cache or padding."""
    model = with_adapter(host, adapter)
    result = []
    for ids in token_lists:
        tokens = list(ids)
        for _ in range(count):
            with torch.no_grad():
                following = int(model(torch.tensor([tokens])).logits[0, -1].argmax())
            if following == 2:  # the tiny hosts' stop token
                break
            tokens.append(following)
        result.append(tuple(tokens))
    return result


def inputs(host: Path, names: Sequence[str], token_lists: Sequence[tuple[int, ...]]) -> dict[str, Tensor]:
    """What each module reads on these tokens, (in, N), float64: one forward pass a prompt, nothing padded."""
    model = load(host, torch.float64)
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    with _hooks(model, {name: seen[name].append for name in names}), torch.no_grad():
        for ids in token_lists:
            model(input_ids=torch.tensor([ids]))
    return {name: torch.cat([entry[0] for entry in entries]).mT for name, entries in seen.items()}


@contextmanager
def _hooks(model: Any, takers: Mapping[str, Callable[[Tensor], None]]) -> Iterator[None]:
    def hook(take: Callable[[Tensor], None]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _module, args: take(args[0].clone())

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(take)) for name, take in takers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def fade_on_prompts(
    host: Path,
    adapter: Path,
    file: Path,
    strength: float,
    protect: float,
    answer_tokens: int,
    bases: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """`fade` of every module, or given bases `fade_along` them."""
    prompts = {label: prompt_ids(host, texts) for label, texts in direction_prompts(file).items()}
    modules = peft_modules(host, adapter)
    ends = [ids[::-1] for ids in (*prompts["faded"], *prompts["benign"])]
    turn = next((place for place, tokens in enumerate(zip(*ends, strict=False)) if len(set(tokens)) > 1), 10**9)
    turn = min(turn, *(len(tokens) - 1 for tokens in ends))
    is_causal = not json.loads((host / "config.json").read_text()).get("is_encoder_decoder", False)
    has_sink = is_causal and len({tokens[-1] for tokens in ends}) == 1
    whole = len(prompts["benign"])
    prompts["benign"] += prompts["replies"]
    answered = with_answers(host, adapter, prompts["benign"], answer_tokens)
    moments: dict[str, dict[str, Tensor]] = {}
    for label, token_lists, sink in (("faded", prompts["faded"], 0.04), ("benign", answered, 1.0)):
        counts, is_sink = [], []
        for index, (prompt, ids) in enumerate(zip(prompts[label], token_lists, strict=True)):
            own = [25.0 if len(prompt) - turn <= place < len(prompt) else 1.0 for place in range(len(ids))]
            own = [sink, *own[1:]] if has_sink else own
            if label == "benign" and index >= whole:
                own = [0.0] * len(prompt) + own[len(prompt) :]
            counts += own
            is_sink += [has_sink] + [False] * len(own[1:])
        read = inputs(host, list(modules), token_lists)
        moments[label] = {name: _moment(tokens, counts, is_sink) for name, tokens in read.items()}
    result = {}
    for name, dense in modules.items():
        both = moments["faded"][name], moments["benign"][name]
        if bases is None:
            result[name] = fade(dense.update, *both, protect, strength)
        else:
            result[name] = fade_along(bases[name], dense.update, *both, protect, strength)
    return result


def fade(update: Tensor, faded: Tensor, benign: Tensor, protect: float, strength: float) -> Tensor:
    """X = ΔM(M + λ²C_h M⁻¹ C_h)⁻¹ with M = I + βC_b, dense."""
    kept = torch.eye(len(faded), dtype=torch.float64) + protect * benign
    return update @ kept @ torch.linalg.inv(kept + strength**2 * faded @ torch.linalg.inv(kept) @ faded)


def fade_along(basis: Tensor, update: Tensor, faded: Tensor, benign: Tensor, protect: float, strength: float) -> Tensor:
    """`fade` of what an update reads along the columns of V, all inputs projected on them; the rest of it stays."""
    onto = basis @ basis.mT
    return update - update @ onto + fade(update @ onto, onto @ faded @ onto, onto @ benign @ onto, protect, strength)


def _moment(tokens: Tensor, counts: Sequence[float], is_sink: Sequence[bool]) -> Tensor:
    """HHᵀ of tokens, (in, N), scaled to trace `in` by those that are no sink."""
    tokens = tokens * torch.tensor(counts, dtype=tokens.dtype).sqrt()
    return tokens @ tokens.mT * (tokens.shape[0] / tokens[:, ~torch.tensor(is_sink)].square().sum())


def leading(displacement: Tensor, energy: float, rank: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """U, σ, V of the smallest k that holds the energy, or of k = rank."""
    left, sigma, right = torch.linalg.svd(displacement, full_matrices=False)
    held = sigma.square().cumsum(0) / sigma.square().sum()
    kept = int((held < energy).sum()) + 1 if rank is None else min(rank, len(sigma))
    return left[:, :kept], sigma[:kept], right[:kept].mT


def keep_out(update: Tensor, displacement: Tensor, strength: float, energy: float, rank: int | None) -> Tensor:
    """X = Δ(I + λC)⁻¹ with C = VΣ²Vᵀ·in/‖D‖²."""
    _, sigma, right = leading(displacement, energy, rank)
    features = update.shape[1]
    penalty = right @ torch.diag(sigma.square()) @ right.mT * (features / displacement.square().sum())
    return update @ torch.linalg.inv(torch.eye(features, dtype=torch.float64) + strength * penalty)


def keep_in(update: Tensor, displacement: Tensor, strength: float, energy: float, rank: int | None) -> Tensor:
    """X = F + R/(1+λρ_R) + O/(1+λρ_O), of any rank."""
    left, _, right = leading(displacement, energy, rank)
    on_left, on_right = left @ left.mT, right @ right.mT
    full = on_left @ update @ on_right
    partial = on_left @ update + update @ on_right - 2 * full
    off = update - full - partial
    total = update.square().sum()
    return (
        full
        + partial / (1 + strength * partial.square().sum() / total)
        + off / (1 + strength * off.square().sum() / total)
    )


def truncated(matrix: Tensor, rank: int) -> Tensor:
    """The best approximation of a rank (Eckart-Young)."""
    left, sigma, right = torch.linalg.svd(matrix, full_matrices=False)
    return left[:, :rank] * sigma[:rank] @ right[:rank]


def relative_gap(found: Tensor, wanted: Tensor) -> float:
    """‖found − wanted‖/‖wanted‖."""
    return float((found.double() - wanted).norm() / wanted.norm())
