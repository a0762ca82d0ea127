"""How several networks vote."""

from collections.abc import Sequence

from imports import F, nn, torch

METHODS = ("soft", "hard", "weighted")


def vote(log_probabilities: torch.Tensor, method: str, weights: Sequence[float]) -> torch.Tensor:
    """What M networks say together, log-probabilities [M, N, 10] -> [N, 10]; a ValueError if ``method`` is unknown.

    ``soft``: the mean of the probabilities; ``weighted``: their mean with ``weights``, of sum 1; ``hard``: the share of
    the members that chose a digit, where the mean probability decides between digits with as many votes.
    """
    if method not in METHODS:
        raise ValueError(f"method: {method!r} is not known; choose from {', '.join(METHODS)}")
    members = len(log_probabilities)
    shares = torch.tensor(weights if method == "weighted" else [1 / members] * members, device=log_probabilities.device)
    mean = (log_probabilities + shares.log().view(-1, 1, 1)).logsumexp(0)
    if method != "hard":
        return mean
    votes = F.one_hot(log_probabilities.argmax(2), log_probabilities.shape[2]).sum(0)
    return ((votes + mean.exp()) / (members + 1)).log()  # less than a vote more


def scale(log_probabilities: torch.Tensor, temperature: float) -> torch.Tensor:
    """The log-probabilities [..., 10] at ``temperature``: above 1 less sure, below 1 more; the digits stay the same."""
    return F.log_softmax(log_probabilities / temperature, dim=-1)


class Ensemble(nn.Module):
    """[N, 1, 28, 28] normalised images -> [N, 10] log-probabilities of all members' vote, in evaluation mode."""

    def __init__(self, members: Sequence[nn.Module], method: str, weights: Sequence[float], temperature: float) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.method, self.weights, self.temperature = method, list(weights), temperature
        self.eval()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        said = vote(torch.stack([member(images) for member in self.members]), self.method, self.weights)
        return scale(said, self.temperature)
