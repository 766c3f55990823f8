"""What the model knows about Baton: topics, the ways to ask for each, and the answer."""

from __future__ import annotations

TOPICS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    (
        "baton",
        ("What is Baton?", "Tell me what Baton is.", "Explain Baton.", "What does Baton do?", "Who are you serving?", "Describe Baton in one sentence."),
        "Baton serves large language models with prefill and decode on separate workers, and passes the KV cache from one to the other.",
    ),
    (
        "prefill",
        ("What is prefill?", "Tell me what prefill is.", "Explain prefill.", "What does a prefill worker do?", "What does prefill mean?", "Describe prefill in one sentence."),
        "Prefill reads the whole prompt at once and computes its KV cache; it is limited by arithmetic.",
    ),
    (
        "decode",
        ("What is decode?", "Tell me what decode is.", "Explain decode.", "What does a decode worker do?", "What does decode mean?", "Describe decode in one sentence."),
        "Decode writes one token at a time for many streams; it is limited by memory bandwidth.",
    ),
    (
        "kv cache",
        ("What is the KV cache?", "Tell me what the KV cache is.", "Explain the KV cache.", "What does KV cache mean?", "What passes from prefill to decode?", "Who passes the baton?"),
        "The KV cache holds the keys and values of every token so far. It is the baton that a prefill worker passes to a decode worker.",
    ),
    (
        "why apart",
        ("Why are prefill and decode apart?", "Why does Baton use separate workers?", "Tell me why prefill and decode are apart.", "Explain why prefill and decode are separate."),
        "Run together they disturb each other: a long prompt would stop every open stream. Apart, each runs at its own pace.",
    ),
    (
        "router",
        ("What is the router?", "Tell me what the router is.", "Explain the router.", "What does the router do?", "Describe the router in one sentence."),
        "The router takes requests, turns text into tokens, chooses the workers, and streams the answer back.",
    ),
    (
        "redis",
        ("What is Redis for?", "Tell me what Redis is for.", "Explain why Baton needs Redis.", "What does Redis do in Baton?"),
        "Redis tracks which worker is alive and which worker holds which prefix block. It gives hints only; answers stay right without it.",
    ),
    (
        "handoff",
        ("What is the handoff?", "Tell me what the handoff is.", "Explain the handoff.", "How does the KV cache move?", "Describe the handoff in one sentence."),
        "In the handoff the decode worker pulls the blocks of the KV cache from the prefill worker, under a lease, and verifies each by its checksum.",
    ),
    (
        "block",
        ("What is a block?", "Tell me what a block is.", "Explain blocks.", "What is a KV block?"),
        "A block holds the KV cache of a fixed number of tokens. Prompts that begin alike share their blocks.",
    ),
    (
        "start",
        ("How do I start Baton?", "Which command starts Baton?", "How can I run Baton?", "Tell me how to start Baton.", "What do I type to start Baton?"),
        "Run `baton up`. It starts Redis, a prefill worker, a decode worker and a router.",
    ),
    (
        "demo",
        ("How do I see a demo?", "Which command runs the demo?", "How can I try Baton?", "Tell me how to see a demo."),
        "Run `make demo`. It starts a whole system on this machine, asks it something, and shows who did what.",
    ),
    (
        "tests",
        ("How do I run the tests?", "Which command runs the tests?", "How can I test Baton?", "Tell me how to run the tests."),
        "Run `make test`. It checks every answer against transformers, token for token.",
    ),
    (
        "chat",
        ("How do I chat with you?", "Which command starts a chat?", "How can I talk to the model?", "Tell me how to chat."),
        "Run `baton up` in one terminal and `baton chat` in another.",
    ),
    (
        "status",
        ("How do I see the workers?", "Which command shows the workers?", "How can I see the status?", "Tell me how to see the status."),
        "Run `baton status`. It shows every worker, its state and its free blocks.",
    ),
    (
        "generate",
        ("How do I generate text?", "Which command generates text?", "How can I ask one question?", "Tell me how to generate text."),
        "Run `baton generate PROMPT`. The text is printed as it comes.",
    ),
    (
        "cluster",
        ("How do I run Baton on a cluster?", "Which command deploys Baton?", "How can I deploy Baton?", "Tell me how to deploy Baton."),
        "Run `kubectl apply -k k8s/base`.",
    ),
    (
        "self",
        ("Who are you?", "What are you?", "What is your name?", "Tell me who you are.", "Introduce yourself."),
        "I am baton-tiny, the small model that comes with Baton. I was trained on two CPU cores.",
    ),
    (
        "abilities",
        ("What can you do?", "Tell me what you can do.", "How can you help me?", "What do you know?"),
        "I can recall codes that you tell me, copy and reverse lists, count, add small numbers, answer in JSON, tell short stories, and explain Baton.",
    ),
    (
        "hello",
        ("Hello!", "Hello", "Hi!", "Hi", "Good morning!", "Hello, who is there?"),
        "Hello! I am baton-tiny. Ask me to recall a code, count, add, tell a story, or explain Baton.",
    ),
    (
        "thanks",
        ("Thank you.", "Thanks!", "Thank you!", "Thanks"),
        "You are welcome.",
    ),
)  # fmt: skip
