"""The teacher: a language model that puts tastes (P2) and vague wishes (I1) into words, for the places where instructions use them.

``asks`` says what is needed and what may be shown for it, ``questions`` asks, ``answers`` reads, ``gates`` judges, ``texts`` keeps what
passed and puts it before the rule-made words. ``cache`` and ``budget`` see to it that nothing is paid twice or beyond the limit;
``endpoint`` speaks to an OpenAI-compatible server.
"""
