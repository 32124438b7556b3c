"""States of other optimizers and schedulers than this project's fit themselves, as users' own tasks have them."""

import pytest
import torch
from torch import optim
from torch.optim import lr_scheduler

from lightning_attn.training.contents import ContentsError, require_optimizer_state, require_same_structure

OPTIMIZERS = ["Adam", "AdamW", "RMSprop", "Adagrad", "Adadelta", "NAdam", "RAdam", "Adamax", "ASGD", "Rprop", "LBFGS"]
SCHEDULERS = {
    "ReduceLROnPlateau": lr_scheduler.ReduceLROnPlateau,
    "OneCycleLR": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10),
    "SequentialLR": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer, [lr_scheduler.ConstantLR(optimizer), lr_scheduler.CosineAnnealingLR(optimizer, 5)], [2]
    ),
}


def stepped(name):
    """A parameter and its optimizer after a step."""
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = getattr(optim, name)([parameter], lr=0.1)

    def loss():
        optimizer.zero_grad()
        value = (parameter**2).sum()
        value.backward()
        return value

    optimizer.step(loss)
    return parameter, optimizer


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_states_of_optimizers(name):
    _, optimizer = stepped(name)
    fresh = getattr(optim, name)([torch.nn.Parameter(torch.ones(3))], lr=0.1)
    assert require_optimizer_state("state", optimizer.state_dict(), fresh) == 0
    other = getattr(optim, name)([torch.nn.Parameter(torch.ones(number)) for number in (3, 2)], lr=0.1)
    with pytest.raises(ContentsError, match=r"param_groups\[0\] is not of 2 parameters"):
        require_optimizer_state("state", optimizer.state_dict(), other)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_states_of_schedulers(name):
    _, optimizer = stepped("Adam")
    scheduler = SCHEDULERS[name](optimizer)
    fresh = SCHEDULERS[name](stepped("Adam")[1]).state_dict()
    require_same_structure("state", scheduler.state_dict(), fresh, counts=False)
    for _ in range(3):
        optimizer.step()
        scheduler.step(*([0.3] if name == "ReduceLROnPlateau" else []))
    stored = scheduler.state_dict()
    require_same_structure("state", stored, fresh, counts=False)
    with pytest.raises(ContentsError, match="is damaged: state holds "):
        require_same_structure("state", stored | {"step": 1}, fresh, counts=False)
    with pytest.raises(ContentsError, match=r"state\.last_epoch is 'nan', and no finite number"):
        require_same_structure("state", stored | {"last_epoch": float("nan")}, fresh, counts=False)
