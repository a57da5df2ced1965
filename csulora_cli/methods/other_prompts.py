"""Controls: the prompts source with other prompts in the place of those that its updates fade on.

What `benign` repairs, fading on any request repairs: it reads the prompts that are protected. `harmful` reads harmful
ones where the prompts source reads their benign look-alikes.
"""

from dataclasses import replace
from operator import attrgetter

from csulora_cli.methods.csulora_prompts import METHODS as _OWN
from csulora_cli.methods.method import Family

METHODS = tuple(
    replace(_OWN[0], name=name, family=Family.CONTROL, summary=f"prompts, fading on {label}", fades_on=attrgetter(kind))
    for name, label, kind in (
        ("harmful", "harmful ones alone", "harmful"),
        ("benign", "the benign ones it protects", "protected"),
    )
)
