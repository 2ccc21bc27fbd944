import numpy as np
import torch
from torch.nn import Parameter

from trainer.optimizers import BETAS, EPS, make_optimizer


def parameters():
    generator = torch.Generator().manual_seed(0)
    return [Parameter(torch.randn(shape, generator=generator)) for shape in ((6, 4), (3, 4))]


def gradients(number, rows):
    generator = torch.Generator().manual_seed(number)
    table, other = (torch.randn(shape, generator=generator) for shape in ((6, 4), (3, 4)))
    table[[row for row in range(6) if row not in rows]] = 0.0
    return table, other


def test_adam_is_that_of_torch_with_the_papers_betas():
    ours, theirs = parameters(), parameters()
    first = make_optimizer("adam", ours, ours[:1], 0.1)
    second = torch.optim.Adam(theirs, lr=0.1, betas=(0.9, 0.98), eps=1e-8, foreach=False)
    for number in range(5):
        for values, optimizer in ((ours, first), (theirs, second)):
            for parameter, grad in zip(values, gradients(number, range(6)), strict=True):
                parameter.grad = grad.clone()
            optimizer.step()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_rowwise_adam_equals_its_definition():
    values = parameters()
    table = values[0].detach().double().numpy().copy()
    optimizer = make_optimizer("rowwise_adam", values, values[:1], 0.1)
    first, second = np.zeros((6, 4)), np.zeros(6)
    for number, rows in enumerate([(0, 3), (3, 5), (0, 1)], start=1):
        grads = gradients(number, rows)
        for parameter, grad in zip(values, grads, strict=True):
            parameter.grad = grad.clone()
        optimizer.step()
        for row in rows:
            g = grads[0][row].double().numpy()
            first[row] = BETAS[0] * first[row] + (1 - BETAS[0]) * g
            second[row] = BETAS[1] * second[row] + (1 - BETAS[1]) * (g**2).mean()
            scale = np.sqrt(second[row] / (1 - BETAS[1] ** number)) + EPS
            table[row] -= 0.1 * first[row] / (1 - BETAS[0] ** number) / scale
    np.testing.assert_allclose(values[0].detach().numpy(), table, rtol=1e-5)


def test_rowwise_adam_leaves_rows_without_gradient_and_updates_others_as_adam():
    values, plain = parameters(), parameters()
    optimizer = make_optimizer("rowwise_adam", values, values[:1], 0.1)
    adam = make_optimizer("adam", plain, [], 0.1)
    for number in range(3):
        for group, by in ((values, optimizer), (plain, adam)):
            for parameter, grad in zip(group, gradients(number, (1, 2)), strict=True):
                parameter.grad = grad.clone()
            by.step()
    start = parameters()[0]
    assert torch.equal(values[0][[0, 3, 4, 5]], start[[0, 3, 4, 5]])
    assert not torch.isclose(values[0][[1, 2]], start[[1, 2]]).any()
    torch.testing.assert_close(values[1], plain[1])


def test_rowwise_adam_goes_on_from_its_state():
    def steps(values, optimizer, numbers):
        for number in numbers:
            for parameter, grad in zip(values, gradients(number, (1, number)), strict=True):
                parameter.grad = grad.clone()
            optimizer.step()

    whole = parameters()
    steps(whole, make_optimizer("rowwise_adam", whole, whole[:1], 0.1), range(4))
    half = parameters()
    before = make_optimizer("rowwise_adam", half, half[:1], 0.1)
    steps(half, before, range(2))
    after = make_optimizer("rowwise_adam", half, half[:1], 0.1)
    after.load_state_dict(before.state_dict())
    steps(half, after, range(2, 4))
    for one, other in zip(whole, half, strict=True):
        assert torch.equal(one, other)
