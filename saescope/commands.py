"""The table of commands: where each lives, what its help says, and examples of it.

It imports none of them, so that help is instant.
"""

from dataclasses import dataclass

from saescope import plugins
from saescope.metrics import common_rows


@dataclass(frozen=True, kw_only=True)
class Command:
    """Where a command lives, and what its help says."""

    module: str
    config: str
    function: str
    summary: str
    examples: tuple[str, ...]
    notes: tuple[str, ...] = ()
    """lines of help that no option shows"""
    positional: str | None = None
    """the field, or the fields separated by spaces, that words without options are the values of;
    one that ends in ... takes all that are left"""
    resumes: bool = False
    gives_exit_code: bool = False
    """whether what the function returns is the exit code"""
    loads_saes: bool = False
    """whether it makes SAEs, of architectures of other packages too (`saescope.plugins`)"""

    def help_lines(self) -> list[str]:
        """The lines above the options in the command's help."""
        notes = (*self.notes, *(plugins.HELP if self.loads_saes else ()))
        return [self.summary, "", "Examples:", *(f"  {e}" for e in self.examples), *notes]


ARCHITECTURES = (
    "abstopk archetypal batchtopk cross_layer_transcoder crosscoder csr feature_choice gated",
    "jumprelu matching_pursuit matryoshka msae mutual_choice relu skip_transcoder temporal topk",
    "transcoder",
)
"""those that come with saescope, so that help needs no torch"""
_MEASURED = [row.label for row in common_rows() if not row.minor]
COMMANDS = {
    "demo": Command(
        module="dashboards.demo_command",
        config="DemoConfig",
        function="demo",
        summary="Go all the way from text to a steered model: harvest, train, eval, index, steer.",
        examples=("saescope demo --quick", "saescope demo"),
        notes=("", "It writes data/, runs/ and stores/ in the current folder."),
        resumes=True,
    ),
    "init": Command(
        module="saescope.init_command",
        config="InitConfig",
        function="init",
        summary="Write the example configurations into a folder, to run and to change.",
        examples=("saescope init", "saescope init my-project"),
        positional="folder",
    ),
    "harvest": Command(
        module="activations.harvesting.command",
        config="HarvestCommand",
        function="run",
        summary="Run a model over text and store activations.",
        examples=(
            "saescope harvest configs/harvest/smollm2-135m-wikipedia.toml",
            "saescope harvest configs/harvest/smollm2-135m-wikipedia.toml "
            "--sites 'blocks.4-9.hook_resid_post' --out data/six-layers",
            "saescope harvest configs/harvest/pythia-70m.toml --plan",
            "saescope harvest configs/harvest/smollm2-135m-wikipedia.toml "
            "--corpus.source 'news/*.jsonl' --append",
            "saescope harvest --from acts.safetensors --out data/mine",
        ),
        notes=(
            "",
            "saescope harvest --from FILE --help shows the options for activations you have.",
        ),
        resumes=True,
    ),
    "join": Command(
        module="activations.harvesting.join_command",
        config="JoinConfig",
        function="run_join",
        summary="Join two harvests of the same text, through two models, into one for crosscoders.",
        examples=(
            "saescope join data/base data/tuned --out data/both",
            "saescope join data/base data/step-100 --names base early --out data/both",
        ),
        positional="harvest_a harvest_b",
    ),
    "train": Command(
        module="sae.commands.train",
        config="TrainConfig",
        function="train",
        summary="Train a sparse autoencoder on a harvest.",
        examples=(
            "saescope train configs/train/topk.toml",
            "saescope train configs/train/topk.toml --sae.k 64 --out runs/topk-64",
            "saescope train configs/train/jumprelu.toml --trainer.target_l0 64 --plan",
        ),
        notes=(
            "",
            "In several processes, to the same result (docs/how-to/several-processes.md):",
            "  torchrun --nproc-per-node 4 -m saescope train configs/train/topk.toml",
            "",
            "Architectures: --sae.kind NAME, whose own fields --sae.kind NAME --help lists:",
            *(f"  {line}" for line in ARCHITECTURES),
        ),
        resumes=True,
        loads_saes=True,
    ),
    "sweep": Command(
        module="sae.commands.sweep",
        config="SweepConfig",
        function="sweep",
        summary="Train many SAEs from one reading of a harvest.",
        examples=(
            "saescope sweep configs/sweep/pareto.toml --plan",
            "saescope sweep configs/sweep/pareto.toml",
        ),
        notes=(
            "",
            "Tables of the file, which are no options:",
            "  [base]    fields of a training file that all members share",
            "  [[grid]]  fields by dotted name; lists are multiplied out into members",
        ),
        resumes=True,
        loads_saes=True,
    ),
    "advise": Command(
        module="sae.commands.advise",
        config="AdviseConfig",
        function="run_advise",
        summary="Find out by short runs which L0, learning rate, width and tokens a run wants.",
        examples=(
            "saescope advise configs/train/batchtopk.toml",
            "saescope advise configs/train/topk.toml --minutes 30 --hours 8",
            "saescope advise --harvest data/mine --out runs/mine --sae.kind batchtopk",
        ),
        notes=("", "It writes OUT-advice/train.toml, for saescope train, and advice.json."),
        loads_saes=True,
    ),
    "eval": Command(
        module="sae.commands.evaluate_runs",
        config="EvaluateRunsConfig",
        function="evaluate_runs",
        summary=f"Measure SAEs on held-out text: {', '.join(_MEASURED)}.",
        examples=(
            "saescope eval runs/smollm2-135m-topk",
            "saescope eval --run runs/x --tokens 65536",
            "saescope eval runs/topk-seed-0 runs/topk-seed-1",
            "saescope eval runs/pareto",
            "saescope eval runs/smollm2-135m-topk --suite core,probing --quick --replace",
            "saescope eval runs/five-seeds --reliability",
            "saescope eval runs/smollm2-135m-topk --controls",
        ),
        notes=(
            "",
            "Of several runs, or a sweep's, those that are measured already are left as they are.",
            "The exit code is 2 if one of them cannot be measured; the others still are.",
        ),
        positional="run runs...",
        gives_exit_code=True,
        loads_saes=True,
    ),
    "report": Command(
        module="dashboards.report_command",
        config="ReportConfig",
        function="report",
        summary="Show what was measured on SAEs, in one page with charts, or as Markdown.",
        examples=(
            "saescope report runs/smollm2-135m-topk",
            "saescope report runs/topk-seed-0 runs/topk-seed-1 --out seeds.html",
            "saescope report runs/pareto --out pareto.md",
        ),
        notes=("", "It reads what `saescope eval` wrote, and measures nothing."),
        positional="run runs...",
    ),
    "index": Command(
        module="sae.commands.index",
        config="IndexConfig",
        function="index",
        summary="Encode a harvest with an SAE into a feature store.",
        examples=(
            "saescope index runs/smollm2-135m-topk --out stores/smollm2-135m-topk",
            "saescope index runs/smollm2-135m-topk --out stores/smollm2-135m-topk --append",
        ),
        positional="run",
        resumes=True,
        loads_saes=True,
    ),
    "effects": Command(
        module="sae.commands.effects",
        config="EffectsConfig",
        function="measure_effects",
        summary="Measure what features do to the next token, and add it to their store.",
        examples=(
            "saescope effects stores/smollm2-135m-topk",
            "saescope effects stores/smollm2-135m-topk --positions 8 --seconds 3600 --replace",
        ),
        positional="store",
        resumes=True,
        loads_saes=True,
    ),
    "diff": Command(
        module="sae.commands.diff",
        config="DiffConfig",
        function="run",
        summary="Find the features that fire more in one group of documents than in another.",
        examples=(
            "saescope diff stores/smollm2-135m-topk --a 'title:*music*|*song*'",
            "saescope diff stores/smollm2-135m-topk --a split:held_out --out diff.parquet",
            "saescope diff stores/news --a all --other stores/wikipedia",
        ),
        positional="store",
    ),
    "compare": Command(
        module="sae.commands.compare",
        config="CompareConfig",
        function="compare",
        summary="Say which SAE is better in what, match features of two, or follow those of one.",
        examples=(
            "saescope compare runs/topk-seed-0 runs/topk-seed-1",
            "saescope compare runs/topk runs/batchtopk runs/jumprelu",
            "saescope compare runs/topk runs/batchtopk --reliability runs/seeds/reliability.json",
            "saescope compare runs/topk-8192 runs/topk-32768 --by activations --out pairs.parquet",
            "saescope compare runs/topk-with-snapshots --out emerged.parquet",
            "saescope compare runs/topk-32768 --versions runs/topk-2048 runs/topk-8192",
        ),
        positional="run_a run_b others...",
        loads_saes=True,
    ),
    "diff-models": Command(
        module="sae.commands.diff_models",
        config="DiffModelsConfig",
        function="run",
        summary="Find the features of a crosscoder over two models that only one of them has.",
        examples=(
            "saescope diff-models runs/both",
            "saescope diff-models runs/both --rows 1000000 --out features.parquet",
        ),
        positional="run",
        loads_saes=True,
    ),
    "attention": Command(
        module="sae.commands.attention",
        config="AttentionConfig",
        function="attention",
        summary="Say which families of features share the attention heads of an SAE's layer.",
        examples=(
            "saescope attention runs/smollm2-135m-z18",
            "saescope attention runs/smollm2-135m-z18 --texts 512 --tested 10",
        ),
        notes=("", "It writes attention.json into the run, where the explorer finds it."),
        positional="run",
        loads_saes=True,
    ),
    "synth": Command(
        module="sae.commands.synth",
        config="SynthConfig",
        function="synth",
        summary="Train architectures on a world whose true features are known, and score them.",
        examples=(
            "saescope synth small",
            "saescope synth small --architectures topk batchtopk --seeds 0 1 2 --samples 5000000",
            "saescope synth 16k --samples 20000000 --out runs/synthsaebench",
            "saescope synth small --runs runs/mine runs/yours --out runs/synth-scores",
        ),
        notes=("", "It writes OUT/scores.json, and each trained run beside it."),
        positional="world",
        resumes=True,
        loads_saes=True,
    ),
    "explore": Command(
        module="dashboards.launch",
        config="ExploreConfig",
        function="explore",
        summary="Open the feature explorer on a store, or on a folder of stores.",
        examples=(
            "saescope explore stores",
            "saescope explore stores/smollm2-135m-topk --port 8600",
        ),
        positional="store",
        loads_saes=True,
    ),
    "export": Command(
        module="dashboards.export_command",
        config="ExportConfig",
        function="export",
        summary="Write features for Neuronpedia, SAEDashboard, CSV, Parquet, or as HTML pages.",
        examples=(
            "saescope export stores/smollm2-135m-topk --features 3,17 --out features.html",
            "saescope export stores/smollm2-135m-topk --format neuronpedia --out neuronpedia",
        ),
        positional="store",
    ),
    "annotations": Command(
        module="store.annotations_command",
        config="AnnotationsConfig",
        function="annotations",
        summary="Export or import a store's labels, notes, tags, lists and votes.",
        examples=(
            "saescope annotations stores/smollm2-135m-topk --export labels.json",
            "saescope annotations stores/smollm2-135m-topk --import labels.csv --conflicts keep",
        ),
        positional="store",
    ),
    "label": Command(
        module="sae.commands.label",
        config="LabelConfig",
        function="label",
        summary="Explain features from the store alone, with scores on held-out text.",
        examples=(
            "saescope label stores/smollm2-135m-topk",
            "saescope label stores/smollm2-135m-topk --features 0-99 --methods token ngram",
            "saescope label stores/smollm2-135m-topk --features 0-9 --url local:smollm2-135m",
        ),
        positional="store",
        resumes=True,
    ),
    "search": Command(
        module="sae.commands.search",
        config="SearchConfig",
        function="search",
        summary="Find features whose label or note means about the same as a text.",
        examples=('saescope search stores/smollm2-135m-topk --text "ships at sea"',),
        positional="store",
    ),
    "sql": Command(
        module="store.sql_command",
        config="SqlConfig",
        function="print_result",
        summary="Ask a feature store in SQL, and print the answer as a table or CSV.",
        examples=(
            "saescope sql stores/smollm2-135m-topk "
            "'SELECT feature, max FROM feature ORDER BY max DESC LIMIT 10'",
            "saescope sql stores/smollm2-135m-topk 'SELECT * FROM feature' --csv",
        ),
        notes=("", "It reads the store and nothing else. `SHOW TABLES` lists the tables."),
        positional="store query",
    ),
    "steer": Command(
        module="sae.commands.steer",
        config="SteerConfig",
        function="steer_text",
        summary="Continue a prompt with and without an edit of features.",
        examples=("saescope steer runs/smollm2-135m-topk --prompt 'The weather' --add 123=8",),
        positional="run",
        loads_saes=True,
    ),
    "circuit": Command(
        module="sae.commands.circuit",
        config="CircuitConfig",
        function="circuit_of_prompt",
        summary="Find which features make a prompt's next token, and how they connect.",
        examples=(
            "saescope circuit runs/smollm2-135m-transcoders --prompt 'The capital of France is'",
            "saescope circuit runs/smollm2-135m-transcoders --prompt 'When Mary and John went to "
            "the store, John gave a drink to' --outputs ' Mary' --against ' John' --out ioi.npz",
        ),
        notes=("", "RUN is the folder of a sweep of transcoders; or runs and SAEs, one by one."),
        positional="run runs...",
        loads_saes=True,
    ),
    "convert": Command(
        module="sae.commands.convert",
        config="ConvertConfig",
        function="convert",
        summary="Write an SAE in another library's format, read one, or upload one.",
        examples=(
            "saescope convert runs/smollm2-135m-topk --to saelens --out exported",
            "saescope convert hf://google/gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82 "
            "--out gemma-12 --harvest data/gemma-2-2b",
            "saescope convert runs/smollm2-135m-topk --to saelens --upload me/smollm2-saes",
        ),
        positional="source",
        loads_saes=True,
    ),
    "bench": Command(
        module="sae.commands.bench",
        config="BenchConfig",
        function="bench",
        summary="Time the operations of a training step, and whole steps, on this machine.",
        examples=(
            "saescope bench",
            "saescope bench --shapes 4096x576x16384x64 --architectures topk jumprelu --what steps",
            "saescope bench --settings dense torch cpu --rounds 9 --out bench.csv",
        ),
        loads_saes=True,
    ),
    "doctor": Command(
        module="sae.commands.doctor",
        config="DoctorConfig",
        function="doctor",
        summary="Check every file of a harvest, run, SAE or store, or of all in a folder.",
        examples=(
            "saescope doctor runs/smollm2-135m-topk",
            "saescope doctor data/smollm2-135m-wikipedia --repair",
            "saescope doctor stores --remove-leftovers",
        ),
        notes=("", "The exit code is 0 if all is well, 1 if anything is wrong."),
        positional="path",
        resumes=True,
        gives_exit_code=True,
        loads_saes=True,
    ),
}
