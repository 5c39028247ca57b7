"""What all models share: auxiliary losses of parts of a batch."""

from __future__ import annotations

import torch

from subquad.models.pretrained import add_aux_loss


def test_the_auxiliary_loss_of_a_part_counts_as_its_labels_do() -> None:
    loss, aux_loss = torch.tensor(2.0), torch.tensor(8.0)
    labels = torch.tensor([[1, 2, -100], [4, -100, -100]])
    assert float(add_aux_loss(loss, aux_loss, labels)) == 10
    assert float(add_aux_loss(loss, aux_loss, labels, num_items_in_batch=12)) == 2 + 8 * 3 / 12
    parts = [add_aux_loss(loss, aux_loss, part, num_items_in_batch=torch.tensor(3)) for part in labels.split(1)]
    assert float(sum(part - loss for part in parts)) == 8


def test_without_an_auxiliary_loss_nothing_is_added() -> None:
    loss = torch.tensor(2.0)
    assert add_aux_loss(loss, None, torch.tensor([1]), num_items_in_batch=4) is loss
