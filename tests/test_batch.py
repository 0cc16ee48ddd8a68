"""The check of a token's range."""

import pytest
import torch

from t2v.batch import check_token_range
from t2v.errors import UserError


@pytest.mark.parametrize("tokens", [[0], [31], [[0, 31], [5, 6]]])
def test_indices_of_the_codebook_are_accepted(tokens):
    check_token_range(torch.tensor(tokens), 32, "never raised.")


@pytest.mark.parametrize(("tokens", "named"), [([0, 32], 32), ([[-1, 3]], -1), ([-2, 40], -2)])
def test_a_token_out_of_range_is_named_with_the_limit_and_the_cause(tokens, named):
    with pytest.raises(UserError, match=rf"^Token {named} is outside the codebook \(0 to 31\): use another file\.$"):
        check_token_range(torch.tensor(tokens), 32, "use another file.")
