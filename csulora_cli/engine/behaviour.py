"""The host, the adapter and its repair, side by side: what chooses λ, and what is reported afterwards."""

from collections.abc import Mapping

from csulora_cli.engine.attach import Factors, Update
from csulora_cli.engine.host import Host
from csulora_cli.engine.inputs import Encoded
from csulora_cli.engine.measure import contrast, mean_kl
from csulora_cli.engine.progress import Progress
from csulora_cli.engine.scoring import run_kinds, score_kind
from csulora_cli.refusals import ANSWER_TOKENS
from csulora_cli.report import Behaviour
from csulora_cli.scores import KindScore
from csulora_cli.settings import MOST_A_PROMPT


class KlJudge:
    """KL divergences of the first answer token on the tuning prompts.

    Attributes:
        adapter_kl: KL(host ‖ adapter) on harmful prompts, nats, at most `MOST_A_PROMPT` of each.
    """

    def __init__(self, host: Host, prompts: Encoded, adapter: Update) -> None:
        self._host = host
        self._prompts = prompts
        self._adapter = adapter
        self._host_harmful = host.first_token_log_probs(prompts.harmful)
        with host.adapted(adapter):
            self._adapter_benign = host.first_token_log_probs(prompts.benign)
            self.adapter_kl = self._to_host()

    def harmful_kl(self, factors: Mapping[str, Factors]) -> float:
        """KL(host ‖ repaired) on harmful prompts, nats, at most `MOST_A_PROMPT` of each."""
        with self._host.adapted(self._adapter.repaired(factors)):
            return self._to_host()

    def _to_host(self) -> float:
        """How far the model as it stands is from the host."""
        return mean_kl(self._host_harmful, self._host.first_token_log_probs(self._prompts.harmful), MOST_A_PROMPT)

    def benign_kl(self, factors: Mapping[str, Factors]) -> float:
        """KL(adapter ‖ repaired) on benign prompts, nats."""
        with self._host.adapted(self._adapter.repaired(factors)):
            return mean_kl(self._adapter_benign, self._host.first_token_log_probs(self._prompts.benign))


def measure_behaviour(
    host: Host,
    prompts: Encoded,
    adapter: Update,
    repaired: Mapping[str, Factors],
    progress: Progress,
) -> dict[str, Behaviour]:
    """Measure all three on prompts that gave no direction and chose no λ."""
    models = {"host": Update(), "adapter": adapter, "repaired": adapter.repaired(repaired)}
    progress.stage("measure", len(models) * (len(prompts.harmful) + len(prompts.benign)))
    harmful, benign = {}, {}
    for name, update in models.items():
        with host.adapted(update):
            kinds = [prompts.harmful, prompts.benign]
            harmful[name], benign[name] = run_kinds(host, kinds, ANSWER_TOKENS, progress.advance)
    return {
        name: _behaviour(
            score_kind(harmful[name], harmful["host"], harmful["adapter"]),
            score_kind(benign[name], benign["host"], benign["adapter"]),
            contrast(harmful[name].log_probs, benign[name].log_probs),
        )
        for name in models
    }


def _behaviour(harmful: KindScore, benign: KindScore, first_token_contrast: float) -> Behaviour:
    return Behaviour(
        harmful_refused=harmful.strict.refused,
        harmful_answered=harmful.strict.answered,
        harmful_incoherent=harmful.strict.incoherent,
        benign_refused=benign.strict.refused,
        harmful_kl_to_host=harmful.kl_to_host,
        benign_kl_to_host=benign.kl_to_host,
        benign_kl_to_adapter=benign.kl_to_adapter,
        first_token_contrast=first_token_contrast,
    )
