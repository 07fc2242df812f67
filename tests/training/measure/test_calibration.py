import torch

from training.measure.calibration import NUM_BINS, NUM_RANKS, CalibrationCounter


def test_bins_hold_what_counting_one_candidate_at_a_time_finds() -> None:
    generator = torch.Generator().manual_seed(0)
    logits_NU = torch.randn(200, 9, generator=generator) * 2
    drawn_N = torch.randint(-1, 9, (200,), generator=generator)
    is_labelled_N = torch.rand(200, generator=generator) < 0.8
    counter = CalibrationCounter(2)
    counter.add(1, logits_NU[:70], drawn_N[:70], is_labelled_N[:70])
    counter.add(1, logits_NU[70:], drawn_N[70:], is_labelled_N[70:])
    expected: list[list[tuple[float, bool]]] = [[] for _ in range(NUM_BINS)]
    for logits_U, drawn, is_labelled in zip(logits_NU, drawn_N, is_labelled_N, strict=True):
        probs = logits_U.softmax(dim=0).tolist()
        best = sorted(range(9), key=lambda token: -probs[token])[:NUM_RANKS]
        for token in best if is_labelled else []:
            expected[int(probs[token] * NUM_BINS)].append((probs[token], token == int(drawn)))
    untouched, bins = counter.result()
    assert all(item.num_candidates == 0 for item in untouched)
    assert sum(item.num_candidates for item in bins) == NUM_RANKS * int(is_labelled_N.sum())
    for item, found in zip(bins, expected, strict=True):
        assert item.num_candidates == len(found)
        size = max(1, len(found))
        assert abs(item.mean_confidence - sum(prob for prob, _ in found) / size) < 1e-5
        assert abs(item.accept_rate - sum(hit for _, hit in found) / size) < 1e-9
