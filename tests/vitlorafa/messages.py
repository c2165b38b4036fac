"""What a message has to name (option, path, number, remedy), whatever its sentence is."""

import re


def naming(*parts: str) -> str:
    """A pattern for `pytest.raises` and `pytest.warns` that matches messages with all of these parts, in any order.

    Args:
        parts: Parts of the message, as they are.
    """
    assert max(map(len, parts)) > 1, "pass several parts, not the letters of one"
    return "(?s)^" + "".join(f"(?=.*{re.escape(part)})" for part in parts)


def assert_only_error(output, named):
    """Checks that a command printed nothing but one sentence, which names all of these words.

    Args:
        output: What pytest's `capsys.readouterr()` returned.
        named: Words of the sentence.
    """
    assert output.out == ""
    assert output.err.startswith("error: ") and [word for word in named if word not in output.err] == []
    assert output.err.count("\n") == 1
