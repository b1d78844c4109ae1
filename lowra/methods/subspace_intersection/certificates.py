"""What the method says of its answer: ten certificates, each with its code and its sentence."""

from __future__ import annotations

from enum import StrEnum

from lowra.methods.subspace_intersection.certify import WELL_CONDITIONED, Evidence

# What is left open in every claim. Let W + C be another weight that explains the merges by updates of no larger total
# rank. Then rank(M_i - C) >= rank(M_i) + rank(C) - dim(col M_i, col C) - dim(row M_i, row C), the dimensions those of
# intersections (Marsaglia and Styan 1974), and summed over the updates the dimensions are n rank(C) at least: so half
# the updates or more have columns or rows of C among their own.
# And what a publisher adds to all models, or takes out of the base before the first, is theirs for all the merges show.
DETERMINED = (
    "W is determined by the merges, up to a component that half of the updates or more share in columns or rows and to "
    "what was put into all models alike"
)
EXPECTED = "expected W-Error {predicted:.2f} before rounding to a grid"
EXACTLY = (
    "some updates share directions of their column or row spaces exactly, and another weight may explain the merges by "
    "updates of equal rank"
)


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

    CERTIFIED = "certified", f"Certified{{basis}}: {DETERMINED}; {EXPECTED}."
    WEAK = (
        "weak",
        f"Precise but weakly conditioned: {DETERMINED}, but the updates nearly share a space or fill the layer "
        f"(lambda_min {{lambda_min:.0e}}), which raises the rounding of the merges; {EXPECTED}.",
    )
    SHARED = (
        "shared",
        f"Not certified, though probably exact: {{why}}. If this is the right one: {EXPECTED}.",
    )
    INCONSISTENT = "inconsistent", "Inconsistent: {contradiction}. {otherwise}"
    NOT_IDENTIFIABLE = "not_identifiable", "Not identifiable: {reason}; {returned}."
    TOO_FEW_MODELS = (
        "too_few_models",
        "Too few models: 2 distinct merges leave a {rank} x {rank} block of W open; at least 3 are needed. "
        "The rest of the layer is identified.",
    )
    LOW_SIGNAL = "low_signal", "Low signal: {found}."
    UP_TO_SCALE = "up_to_scale", "{sentence}"
    UP_TO_ROTATION = "up_to_rotation", "{sentence}"
    UNCERTIFIED = "uncertified", "{sentence}"

    def sentence(self, **facts: object) -> str:
        """The sentence, its gaps filled."""
        return self.template.format(**facts)


def verdict(
    evidence: Evidence, ranks: tuple[int, ...], *, rest: bool, contradicted: int | None, simpler: tuple[int, ...] | None
) -> tuple[Certificate, str]:
    """The certificate that the evidence allows, and its sentence.

    ranks: found. rest: all but the directions that all updates share is determined. contradicted: the rank granted,
    where those found contradict it. simpler: ranks of an explanation that needs less, where only this one agrees with
    the rank granted.
    """
    predicted, lambda_min = evidence.predicted, evidence.lambda_min
    if predicted is None:
        returned = "there the mean is returned, the other directions are recovered" if rest else "the mean is returned"
        certificate = Certificate.NOT_IDENTIFIABLE
        return certificate, certificate.sentence(reason=why_open(evidence), returned=returned)
    facts = {"predicted": predicted, "lambda_min": lambda_min, "basis": "", "why": EXACTLY}
    if contradicted is not None:
        certificate = Certificate.INCONSISTENT
        facts["contradiction"] = (
            f"the updates found have ranks {listed(ranks)}, not the granted {contradicted}; a component that most of "
            "the updates share would look like this and stay in the estimate"
        )
        facts["otherwise"] = f"If there is none: {EXPECTED}.".format(predicted=predicted)
    elif simpler is not None:
        certificate = Certificate.SHARED
        facts["why"] = (
            "this weight leaves updates of the granted rank, but another one explains the merges by fewer ranks "
            f"({listed(simpler)}), the difference being a component that most of the updates share"
        )
    elif evidence.ambiguous:
        certificate = Certificate.SHARED
    elif lambda_min < WELL_CONDITIONED:
        certificate = Certificate.WEAK
    else:
        certificate = Certificate.CERTIFIED
    return certificate, certificate.sentence(**facts)


def listed(ranks: tuple[int, ...]) -> str:
    """Ranks in words."""
    return ", ".join(map(str, ranks))


def why_open(evidence: Evidence) -> str:
    """What leaves W open. A direction that all updates but one share looks like one that all do, from the merges."""
    sides = ((evidence.shared_columns, "column"), (evidence.shared_rows, "row"))
    shared = " and ".join(f"{size} {side} direction{'s' * (size > 1)}" for size, side in sides if size)
    if shared:
        return f"all updates, or all but one, seem to share {shared}, in which any part of them may belong to W"
    return (
        "several weights explain the merges equally well (ranks too large for the layer or for so few models, or "
        "spaces shared by some of them)"
    )
