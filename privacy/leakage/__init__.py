"""The leakage audit: what the activations at a cut let an attacker reconstruct, measured by attacking them.

Tier 1 takes a minute a cut: distance correlation (:mod:`correlation`), an informed decoder (:mod:`decoding`) and label
inference (:mod:`labels`), beside baselines that need no attack. Tier 2 (``deep``) takes more: model inversion without
data (:mod:`inversion`), a pseudo-client (:mod:`pseudo`) and feature-space hijacking (:mod:`hijack`).

A high figure is a finding. A low one proves nothing: a better attack may exist, and none of this is a claim of
differential privacy.
"""

from privacy.leakage.advice import Advice, advise
from privacy.leakage.audit import attack_names, audit, audit_cut
from privacy.leakage.bench import Bench
from privacy.leakage.report import write_report
from privacy.leakage.results import Attack, CutLeakage, Exhibit, LabelGuess, Outcome, Score, Settings, Treatment
from privacy.leakage.victim import Parts

__all__ = [
    "Advice",
    "Attack",
    "Bench",
    "CutLeakage",
    "Exhibit",
    "LabelGuess",
    "Outcome",
    "Parts",
    "Score",
    "Settings",
    "Treatment",
    "advise",
    "attack_names",
    "audit",
    "audit_cut",
    "write_report",
]
