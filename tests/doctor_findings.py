"""What the checks of ``doctor`` found, for its tests."""

from megaresid.checks.finding import Finding


def only(findings, level: str) -> Finding:
    (found,) = [finding for finding in findings if finding.level == level]
    return found


def levels(findings) -> set[str]:
    return {finding.level for finding in findings}
