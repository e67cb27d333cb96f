from __future__ import annotations

from collections.abc import Iterator

import pytest

from graftlm.core.notices import collected, forget_notices, notice, notices_to


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    forget_notices()
    yield
    forget_notices()


def test_once_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    notice("slow here")
    notice("slow here")
    out, err = capsys.readouterr()
    assert (out, err) == ("", "note: slow here\n")
    assert collected() == ("slow here",)


def test_a_sink_replaces_and_gives_back(capsys: pytest.CaptureFixture[str]) -> None:
    heard: list[str] = []
    with pytest.raises(RuntimeError), notices_to(heard.append):
        notice("inside")
        raise RuntimeError
    notice("outside")
    assert heard == ["inside"]
    assert capsys.readouterr().err == "note: outside\n"
    assert collected() == ("inside", "outside")
