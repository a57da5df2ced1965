"""Control: the prompts source with benign prompts in the place of the harmful ones.

What this repairs needs no harmful prompt: it is "fade on any request" that does it.
"""

from csulora_cli.engine.prompts_source import closest
from csulora_cli.methods.csulora_prompts import METHODS as _OWN
from csulora_cli.methods.method import Family, MomentsMethod

METHODS = (
    MomentsMethod(
        name="benign",
        family=Family.CONTROL,
        summary="prompts, benign ones in the place of the harmful",
        symbol=_OWN[0].symbol,
        grid=_OWN[0].grid,
        has_auto=True,
        solve=closest,
        reads_harmful=False,
    ),
)
