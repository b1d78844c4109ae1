"""What the method says of its answer: seven certificates, each with its code and its sentence."""

from __future__ import annotations

from enum import StrEnum

from lowra.methods.subspace_intersection.certify import WELL_CONDITIONED, Evidence

# Singular values of the updates end in a clear edge, not in the noise, when the last one is this far above the cutoff.
CLEAR_EDGE = 30.0

EXPECTED = "expected W-Error {predicted:.2f} before rounding to a grid"


class Certificate(StrEnum):
    """How far an answer can be trusted.

    The value is the code that records carry; `template` the sentence, whose gaps `sentence` fills.
    """

    template: str

    def __new__(cls, code: str, template: str) -> Certificate:
        """A code with its sentence."""
        member = str.__new__(cls, code)
        member._value_ = code
        member.template = template
        return member

    CERTIFIED = "certified", f"Certified{{basis}}: W is determined by the merges; {EXPECTED}."
    WEAK = (
        "weak",
        "Precise but weakly conditioned: the updates nearly share a space or fill the layer (lambda_min "
        f"{{lambda_min:.0e}}), which raises the rounding of the merges; {EXPECTED}.",
    )
    SHARED = (
        "shared",
        "Not certified, though probably exact: some updates share directions of their column or row spaces exactly, "
        "and another weight may explain the merges by updates of equal rank. If this is the right one: "
        f"{EXPECTED}.",
    )
    INCONSISTENT = "inconsistent", "Inconsistent: {contradiction}. {otherwise}"
    NOT_IDENTIFIABLE = "not_identifiable", "Not identifiable: {reason}; {returned}."
    TOO_FEW_MODELS = (
        "too_few_models",
        "Too few models: 2 distinct merges leave a {rank} x {rank} block of W open; at least 3 are needed. "
        "The rest of the layer is identified.",
    )
    LOW_SIGNAL = "low_signal", "Low signal: {found}."

    def sentence(self, **facts: object) -> str:
        """The sentence, its gaps filled."""
        return self.template.format(**facts)


def verdict(evidence: Evidence, hint: int | None, rank: int, *, rest: bool) -> tuple[Certificate, str]:
    """The certificate that the evidence allows, and its sentence.

    rank: the largest found. rest: all but the directions that all updates share is determined.
    """
    predicted, lambda_min = evidence.predicted, evidence.lambda_min
    if predicted is None:
        returned = "there the mean is returned, the other directions are recovered" if rest else "the mean is returned"
        certificate = Certificate.NOT_IDENTIFIABLE
        return certificate, certificate.sentence(reason=why_open(evidence), returned=returned)
    if hint is not None and rank < hint and evidence.edge > CLEAR_EDGE:
        certificate = Certificate.INCONSISTENT
        contradiction = (
            f"the updates have rank {rank} at most, with a clear edge, not the granted {hint}; a component that all of "
            "them share would look like this and stay in the estimate"
        )
        otherwise = f"If there is none: {EXPECTED}.".format(predicted=predicted)
        return certificate, certificate.sentence(contradiction=contradiction, otherwise=otherwise)
    if evidence.ambiguous:
        certificate = Certificate.SHARED
    elif lambda_min < WELL_CONDITIONED:
        certificate = Certificate.WEAK
    else:
        certificate = Certificate.CERTIFIED
    return certificate, certificate.sentence(basis="", predicted=predicted, lambda_min=lambda_min)


def why_open(evidence: Evidence) -> str:
    """What leaves W open."""
    sides = ((evidence.shared_columns, "column"), (evidence.shared_rows, "row"))
    shared = " and ".join(f"{size} {side} direction{'s' * (size > 1)}" for size, side in sides if size)
    if shared:
        return f"all updates share {shared}, in which any part of them may belong to W"
    return (
        "several weights explain the merges equally well (ranks too large for the layer or for so few models, or "
        "spaces shared by some of them)"
    )
