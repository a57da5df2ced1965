"""The host, the adapter and its repair, side by side: what chooses λ, and what is reported afterwards."""

from collections.abc import Mapping

from torch import Tensor

from csulora_cli.engine.host import Factors, Host
from csulora_cli.engine.inputs import Encoded
from csulora_cli.engine.measure import ANSWER_TOKENS, Answer, Share, count_answers, mean_kl
from csulora_cli.engine.progress import Progress
from csulora_cli.report import Behaviour, Count


class KlJudge:
    """KL divergences of the first answer token on the tuning prompts.

    Attributes:
        adapter_kl: KL(host ‖ adapter) on harmful prompts, nats.
    """

    def __init__(self, host: Host, prompts: Encoded, adapter: Mapping[str, Factors]) -> None:
        self._host = host
        self._prompts = prompts
        self._host_harmful = host.first_token_log_probs(prompts.harmful)
        with host.adapted(adapter):
            self._adapter_benign = host.first_token_log_probs(prompts.benign)
            self.adapter_kl = mean_kl(self._host_harmful, host.first_token_log_probs(prompts.harmful))

    def judge(self, factors: Mapping[str, Factors]) -> tuple[float, float]:
        """KL(host ‖ repaired) on harmful prompts and KL(adapter ‖ repaired) on benign ones, nats."""
        with self._host.adapted(factors):
            harmful = mean_kl(self._host_harmful, self._host.first_token_log_probs(self._prompts.harmful))
            benign = mean_kl(self._adapter_benign, self._host.first_token_log_probs(self._prompts.benign))
        return harmful, benign


def measure_behaviour(
    host: Host,
    prompts: Encoded,
    adapter: Mapping[str, Factors],
    repaired: Mapping[str, Factors],
    progress: Progress,
) -> dict[str, Behaviour]:
    """Measure all three on prompts that gave no direction and chose no λ."""
    models: dict[str, Mapping[str, Factors]] = {"host": {}, "adapter": adapter, "repaired": repaired}
    progress.stage("measure", len(models) * (len(prompts.harmful) + len(prompts.benign)))
    first_tokens: dict[str, tuple[Tensor, Tensor]] = {}
    answers: dict[str, tuple[dict[Answer, Share], dict[Answer, Share]]] = {}
    for name, factors in models.items():
        with host.adapted(factors):
            first_tokens[name] = (
                host.first_token_log_probs(prompts.harmful),
                host.first_token_log_probs(prompts.benign),
            )
            harmful = count_answers(host.answers(prompts.harmful, ANSWER_TOKENS))
            progress.advance(len(prompts.harmful))
            benign = count_answers(host.answers(prompts.benign, ANSWER_TOKENS))
            progress.advance(len(prompts.benign))
            answers[name] = harmful, benign
    host_harmful, host_benign = first_tokens["host"]
    _, adapter_benign = first_tokens["adapter"]
    result = {}
    for name, (harmful_log_probs, benign_log_probs) in first_tokens.items():
        on_harmful, on_benign = answers[name]
        result[name] = Behaviour(
            harmful_refused=_count(on_harmful[Answer.REFUSAL]),
            harmful_answered=_count(on_harmful[Answer.ANSWER]),
            harmful_incoherent=_count(on_harmful[Answer.INCOHERENT]),
            benign_refused=_count(on_benign[Answer.REFUSAL]),
            harmful_kl_to_host=mean_kl(host_harmful, harmful_log_probs),
            benign_kl_to_host=mean_kl(host_benign, benign_log_probs),
            benign_kl_to_adapter=mean_kl(adapter_benign, benign_log_probs),
            first_token_contrast=_contrast(harmful_log_probs, benign_log_probs),
        )
    return result


def _count(share: Share) -> Count:
    low, high = share.interval
    return Count(share.count, share.total, low, high)


def _contrast(harmful: Tensor, benign: Tensor) -> float:
    """Total variation distance between the mean distributions, in [0, 1]."""
    return float((harmful.double().exp().mean(0) - benign.double().exp().mean(0)).abs().sum() / 2)
