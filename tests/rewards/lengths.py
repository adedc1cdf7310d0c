"""A reward that a random model earns now and then."""


def even(prompts, texts, truncated):
    """1 for a text of even length."""
    return [float(len(text) % 2 == 0) for text in texts]
