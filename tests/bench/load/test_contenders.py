from bench.load.contenders import Contender, Run, race_turn, warm_up
from bench.measure.timing import Timing
from bench.workload.dialogues import Turn
from tests.bench.traces import make_turn


class Notes:
    """Contenders that note who was asked what."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int, int]] = []
        self.contenders = {name: self._contender(name) for name in "abc"}

    def _contender(self, name: str) -> Contender:
        def answer(turn: Turn, max_new_tokens: int) -> Run:
            self.asked.append((name, turn.conversation.line, max_new_tokens))
            return Run(Timing(10, 1.0, 0.5), (0,) * 10, 9)

        return answer


def test_contenders_take_turns_in_beginning() -> None:
    notes = Notes()
    for number in range(3):
        race = race_turn(notes.contenders, make_turn((1,), line=number + 1), 20, number)
        assert list(race.runs) == ["a", "b", "c"]
        assert race.category == "chat"
    assert "".join(name for name, _, _ in notes.asked) == "abcbcacab"
    assert [line for _, line, _ in notes.asked] == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert {length for _, _, length in notes.asked} == {20}


def test_the_warm_up_is_short() -> None:
    for longest, expected in ((20, 8), (4, 4)):
        notes = Notes()
        warm_up(notes.contenders, make_turn((1,)), longest)
        assert notes.asked == [(name, 1, expected) for name in "abc"]
