"""Chat templates in the shapes that published ones have."""

from __future__ import annotations

LOOP = "{% for m in messages %}BODY{% endfor %}{% if add_generation_prompt %}<|a|>{% endif %}"
TEMPLATES = {
    "plain": LOOP.replace("BODY", "<|{{ m.role[0] }}|>{{ m.content }}<|end|>\n"),
    "trims": LOOP.replace("BODY", "<|{{ m.role[0] }}|>{{ m.content | trim }}<|end|>"),
    "merges the system turn": (
        "{% if messages[0].role == 'system' %}{% set s = messages[0].content + '\n' %}"
        "{% set rest = messages[1:] %}{% else %}{% set s = '' %}{% set rest = messages %}{% endif %}"
        "{% for m in rest %}{% if m.role == 'user' %}[INST] {{ (s if loop.first else '') + m.content }}"
        " [/INST]{% else %} {{ m.content | trim }} </s>{% endif %}{% endfor %}"
    ),
    "takes no system turn": (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
        "{% endif %}<|{{ m.role[0] }}|>{{ m.content }}<|end|>{% endfor %}"
    ),
    "drops thoughts of earlier turns": LOOP.replace(
        "BODY",
        "<|{{ m.role[0] }}|>{% if loop.last and m.reasoning_content %}<think>"
        "{{ m.reasoning_content }}</think>{% endif %}{{ m.content.split('</think>')[-1] }}<|end|>",
    ),
    "puts the question last": (
        "{% for m in messages if m.role == 'system' %}S {{ m.content }}\n{% endfor %}"
        "{% for m in messages if m.role != 'system' %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    ),
    "writes thinking": LOOP.replace(
        "BODY",
        "<|{{ m.role[0] }}|>{% if m.thinking %}{{ m.thinking }}<|say|>{% endif %}"
        "{{ m.content }}<|end|>",
    ),
}
"""What templates do with a response that stands in them as it is."""

UNSOUND = {
    "shouts": LOOP.replace("BODY", "<|{{ m.role[0] }}|>{{ m.content | upper }}<|end|>"),
    "says it twice": LOOP.replace("BODY", "{{ m.content }}|{{ m.content }}"),
    "leaves it out": LOOP.replace("BODY", "{{ m.content if m.role == 'user' }}"),
    "cuts it": LOOP.replace("BODY", "{{ m.content[:6] }}"),
}
"""Templates in which no response has a span."""
