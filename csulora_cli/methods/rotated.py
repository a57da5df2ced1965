"""Control: the prompts source with the covariance of what fades turned at random.

    C_h ← R C_h Rᵀ,   R orthogonal, uniformly distributed

Its spectrum stays, its directions go. What this repairs, the amount of fading repairs and not where it happens.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from csulora_cli.engine.attach import Factors
from csulora_cli.engine.inputs import Form, Moments
from csulora_cli.engine.prompts_source import closest
from csulora_cli.formats.site import Site
from csulora_cli.methods.csulora_prompts import METHODS as _OWN
from csulora_cli.methods.method import Family, random_basis, seeded


def rotated(moments: Moments, name: str) -> Moments:
    """The moments with R C_h Rᵀ in the place of C_h; R depends on the name alone.

    Of tokens H, (in, N), only R·range(H) is drawn: with H = QT, RH = Q'T for a random orthonormal Q'. That has the
    distribution of RH and costs O(in·N²), not O(in³).
    """
    faded, generator = moments.faded, seeded(name)
    if moments.form is Form.DIAGONAL:  # of an embedding: the tokens change places, since a turned diagonal is none
        places = torch.randperm(len(faded), generator=generator).to(faded.device)
        return replace(moments, faded=faded[places])
    if moments.form is Form.MOMENT:
        rotation = random_basis(faded.shape[0], faded.shape[0], generator).to(faded.device)  # (in, in)
        return replace(moments, faded=rotation @ faded @ rotation.mT)
    triangle = torch.linalg.qr(faded, mode="r").R  # T, (p, N)
    basis = random_basis(faded.shape[0], triangle.shape[0], generator).to(faded.device)  # Q', (in, p)
    return replace(moments, faded=basis @ triangle)


def solve(members: Sequence[Site], moments: Moments, protect: float, strength: float) -> dict[str, Factors]:
    """The closest updates at λ with the rotated moments."""
    return closest(members, rotated(moments, members[0].name), protect, strength)


METHODS = (
    replace(
        _OWN[0],
        name="rotated",
        family=Family.CONTROL,
        summary="prompts, the covariance of what fades turned at random",
        solve=solve,
    ),
)
