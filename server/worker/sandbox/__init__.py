"""Code archives in processes of their own: this worker starts, asks, measures and ends them. It never runs their code.

    worker ── control (seqpacket, descriptors) ── template ── fork ── one child for each archive
       └───────── one channel (stream) for each child ───────────────────┘

The *template* is a process that has imported torch and nothing of any archive. It has one thread, so that a fork of it
is sound, and answers each `ForkChild` with a child that is ready in milliseconds and shares the template's pages. It
never touches CUDA. It adopts every process that a child leaves behind (it is their subreaper), and kills it.

A *child* confines itself before the archive's first line runs (`inside/confinement.py`): a session and process group of
its own, its own folder, a user of its own where the worker is root (`inside/child_users.py`), Landlock where the kernel
has it, limits of address space, open files, processes, file sizes and processor time, no descriptors but its channel
and its output, an environment without credentials, and modules that are not ours (`inside/module_space.py`). Then it
loads the handler (`inside/torchserve_handler.py`, `inside/sagemaker_script.py`) and answers batches, one at a time.

The worker's side: `code_host.py` owns the template and starts children, on the threads of the loads' code lane;
`child_process.py` is one child as the step thread sees it, which it never waits for; `child_output.py` turns what a
child prints into log lines, bounded in rate; `memory_use.py` measures. `messages.py` is what the processes say to each
other. `inside/` runs in the template and the children, and imports nothing else of ours but `messages.py`.

INVARIANT: nothing that a child sends is trusted: lengths are checked before memory is taken, types when decoded.
INVARIANT: a child ends when its model leaves the cache, when the template or the worker ends, and when its handle is
collected.
"""
