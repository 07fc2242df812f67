from tests.training.corpora import corpus, document
from training.data.batches import (
    BatchPlan,
    DocumentBatch,
    DocumentSource,
    epoch_generator,
    shuffled,
)
from training.data.dataset import Corpus


def test_an_order_depends_on_seed_epoch_and_purpose_alone() -> None:
    keys = [(0, 0, "a"), (1, 0, "a"), (0, 1, "a"), (0, 0, "b")]
    seeds = [epoch_generator(*key).initial_seed() for key in keys]
    assert len(set(seeds)) == 4
    assert seeds == [epoch_generator(*key).initial_seed() for key in keys]
    assert sorted(shuffled(9, 0, 3)) == list(range(9))
    assert shuffled(9, 0, 3) == shuffled(9, 0, 3) != shuffled(9, 0, 4)


class TestSource:
    CORPUS = Corpus((*corpus(9).documents, document(8, (5, 6), name="no examples")))

    def names(self, batches: list[DocumentBatch]) -> list[list[str]]:
        return [[doc.conversation_id for doc in batch.documents] for batch in batches]

    def test_every_document_with_examples_comes_once_an_epoch(self) -> None:
        source = DocumentSource(self.CORPUS, BatchPlan(16, 0))
        batches = list(source.batches(0))
        names = [name for batch in self.names(batches) for name in batch]
        assert sorted(names) == [f"c{i}" for i in range(9)]
        assert source.num_batches(0) == len(batches)
        assert sum(map(len, batches)) == self.CORPUS.num_examples

    def test_a_batch_ends_with_the_document_that_fills_it(self) -> None:
        batches = list(DocumentSource(self.CORPUS, BatchPlan(16, 0)).batches(0))
        for batch in batches[:-1]:
            assert len(batch) >= 16
            assert len(batch) - batch.documents[-1].num_examples < 16

    def test_order_depends_on_seed_and_epoch_alone(self) -> None:
        orders = [
            self.names(list(DocumentSource(self.CORPUS, BatchPlan(16, seed)).batches(epoch)))
            for seed, epoch in ((0, 0), (0, 0), (0, 1), (1, 0))
        ]
        assert orders[0] == orders[1]
        assert orders[0] != orders[2]
        assert orders[0] != orders[3]

    def test_an_epoch_can_be_resumed_in_its_middle(self) -> None:
        source = DocumentSource(self.CORPUS, BatchPlan(16, 0))
        assert list(source.batches(1, first=2)) == list(source.batches(1))[2:]
