"""Arms compared in one run: remote drafting beside the alternatives, tree settings beside each other, the demo.

Who owns which data, and its way through the files, in the words of `lab`:

- *Arms* (`arms`) with the same target share one process: tree arms are requests with overrides at one remote target.
- *Options* (`plan`) own what is compared, and derive from it cells and the order in which blocks of them are measured.
- `lineup` turns options into processes; `run` starts them as they are needed, makes a *station* of each arm, and keeps
  every record in the journal (`lab.records`) as it is made.
- `references` take the target's own texts; `measure` sends them through the stations, compares outputs, and makes a
  *batch* of what each request took and added to the counters.
- A *result* (`result`) is what a journal has, with the settings and where the figures come from, which is asked once,
  before anything is written. `rows` sums it up per cell and pairs arms by prompt.
- Three reports read rows, and make of them a document, a result file and a picture, which `run` publishes: `figures`,
  `report` and `plots` those of `wanspec bench`, `trees_figures` and `trees_report` those of ``make bench-trees``
  (`trees`), `demo_report` that of `wanspec demo` (`demo`, which people look on to).

Nothing downstream of a result knows servers, files or clocks.
"""
