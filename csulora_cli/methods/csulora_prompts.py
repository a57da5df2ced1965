"""csulora, source prompts: updates fade on what the host reads in prompts that look harmful, and hold on benign ones.

    A' = A M (M + λ²C_h M⁻¹C_h)⁻¹,   M = I + βC_b,   B' = B

Our own formulation; `solver.attenuate` has the closed forms, `engine.prompts_source` what runs them.
"""

from csulora_cli.engine.prompts_source import closest
from csulora_cli.methods.method import Family, MomentsMethod, logarithmic

METHODS = (
    MomentsMethod(
        name="prompts",
        family=Family.CSULORA,
        summary="fades on what looks harmful, holds on benign prompts",
        symbol="λ",
        grid=logarithmic(0.25, 64),
        has_auto=True,
        solve=closest,
    ),
)
