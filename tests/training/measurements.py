"""A measurement of heads that nobody trained."""

from heads.tree_search import AcceptanceProfile, best_tree
from training.measure.acceptance import Measurement
from training.measure.calibration import NUM_BINS, CalibrationBin
from training.measure.evaluate import EvaluationResult, TreeResult

PROFILE = AcceptanceProfile(((0.333333333, 0.1), (0.25, 0.05)))


def measurement(category: str = "qa") -> Measurement:
    trees = (TreeResult(1, 1.0, 1.0), TreeResult(8, 1.654321, 1.7))
    result = EvaluationResult(PROFILE, trees, {category: 1.7}, best_tree(PROFILE, 5), 3, 60)
    bins = tuple(CalibrationBin(i, (i + 0.5) / NUM_BINS, i / NUM_BINS) for i in range(NUM_BINS))
    return Measurement(result, (bins, bins))
