"""Measuring: what remote drafting costs and brings. An extra of the package: no server imports it.

Its ten nouns, in the order in which they come about:

- *arm*: one way to draft that is compared: a target, and what its requests ask for.
- *cell*: an arm at one round trip and one number of streams.
- *block*: cells whose requests alternate under one setting of the WAN.
- *reference*: a prompt and the target's own text, which every arm has to repeat.
- *station*: an arm's running target as it is measured: a client, and a probe of its counters and processor time.
- *batch*: requests that a station served together: their times, what they added to the counters, what was wrong.
- *journal*: every record on disk as it is made, so that an interrupted run goes on.
- *row*: a cell's figures, paired by prompt with those of other arms.
- *bar*: a figure that is asked for; the end of its 95 % interval is judged.
- *document*: what people read of a result, on the console as on a page.

Rooms: `harness` (machine, servers, client, metrics, outputs), `records` and `stats`, `report` (documents and how they
are written), `compare` (arms beside each other), `drafter` and `target` (what each side alone costs).
"""
