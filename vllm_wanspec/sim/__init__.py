"""One invented pair of models, one engine, one network: the room of all that is played without a model on a device.

Tests, benches and simulations put it around the real sessions, hosts and codec, so that each thing is invented once:

- `models`: the target and the draft model over one language. It never changes, and whoever asks may share it.
- `engine`: says what a draft model says, at a pace or by hand. It owns its branches; one event loop or one caller
  drives it, and others may hold it back or make it fail.
- `network`: a wire owns the frames that are in flight; one side puts them on, the other takes them off.
- `host`: the drafter's own connections and sessions on such an engine, stepped by hand.
- `history`: what a history on virtual time begins with, and its requests and logs.
- `pair`: a target's sessions, two wires and a host, on one clock. It owns all of them, and its calls alone change them.
- `service`: the drafter as a process on a real socket. Its event loop owns the host and the engine.
- `target`: the target as a thread that steps a real proposer. It owns its requests, and hands the proposer what vLLM's
  runner and scheduler would.
- `controller`: the controller without a target: sessions at a real drafter, committed by a clock. Whoever connects
  owns the connection; a stream's commits are drawn from its own draft.
- `proposers`: stand-ins for a drafter in vLLM's `custom_class`: one knows all that the target will say, one nothing.

Data goes one way: a language is told to engines and targets, tokens go from an engine into a host, and frames alone go
between a drafter and a controller. Seeds and clocks come in as arguments. Nothing here needs vLLM or torch, and nothing
here knows the controller's shells or the benches.
"""
