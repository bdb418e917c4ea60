"""The README says what is so: its settings are the code's."""

from pathlib import Path

from pydantic import SecretStr

from services.common.config import Settings, variable

README = Path(__file__).parents[2] / "README.md"


def settings_table() -> str:
    lines = ["| variable | default | meaning |", "| --- | --- | --- |"]
    for name, field in Settings.model_fields.items():
        default = field.default
        if isinstance(default, SecretStr):
            default = default.get_secret_value()
        if isinstance(default, tuple):
            default = ",".join(map(str, default))
        lines.append(
            f"| `{variable(name)}` | {f'`{default}`' if str(default) else ''} | {field.description} |"
        )
    return "\n".join(lines)


def test_every_setting_stands_in_the_readme() -> None:
    text = README.read_text()
    stands = text.split("<!-- settings -->")[1].split("<!-- /settings -->")[0].strip()
    assert stands == settings_table(), f"put this table into the README:\n{settings_table()}"
