"""Makes text safe to show: archives, clients and stores can put anything into names and messages. Pure."""


def escape_text(text: str, keep: str = "") -> str:
    """The text on one line without characters that a terminal acts on: control, format and separator characters.

    `keep` has characters that stay.
    """
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() or one in keep else ascii(one)[1:-1] for one in text)
