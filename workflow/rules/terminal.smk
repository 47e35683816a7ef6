# What a run says on the terminal. The logger (workflow/snakemake_logger_plugin_cupel) sees events alone: it is told here what the
# jobs are, how long they will take, and what was found.

from cupel import plan
from cupel.registry import unknown
from cupel.reporting.terminal import summary


def found():
    """What the papers that are done have shown, and where to look; empty where no report was asked for."""
    dag = workflow.dag
    made = {str(file) for job in dag.jobs if dag.noneedrun_finished(job) for file in job.output}
    claims = {paper: f"{PATHS.paper(paper)}/claims.csv" for paper in GRID.papers}
    papers = [(paper, GRID.experiments[paper]["title"], file) for paper, file in claims.items() if file in made]
    pages = [
        f"{OWN_FOLDER}/index.html",
        f"{RESULTS}/index.html",
        *(f"{PATHS.paper(paper)}/report.html" for paper in GRID.papers),
    ]
    page = next((f"The report: {os.path.abspath(page)}" for page in pages if page in made), "")
    cells = f"{RESULTS}/cells.parquet"
    text = summary(papers, cells if cells in made else None, expected_cells()) if papers else ""
    return "\n".join(filter(None, [text, page]))


def announce():
    """Tell the logger what will run."""
    cores = workflow.resource_settings.cores or os.cpu_count()
    jobs, patterns = plan.jobs_of(workflow)
    costs = plan.measured(here(config["results"]), config["scale"], jobs.values(), patterns)
    plan.keep_graph(here(f"{config['results']}/benchmark/{config['scale']}"), jobs.values())
    times = plan.Times(config["scale"], [*costs, *plan.read_costs(plan.COSTS)], plan.hardware(RESULTS))
    todo = {
        workflow.dag.jobid(job): (known.rule, dict(known.wildcards), known.cells, times.of(known), known.threads)
        for job, known in jobs.items()
        if known.todo
    }
    papers = f"Scale {config['scale']}, papers {', '.join(GRID.papers)}"
    what = f"Models of {config['own']}" if TARGETS == ["own"] else papers
    logger.info(None, extra={"cupel": {"jobs": todo, "cores": cores, "what": what}})


def print_found():
    """The last lines of a run."""
    if text := found():
        logger.info(text)


def check_targets():
    """Names asked for are there; paths are Snakemake's to judge.

    Raises:
        WorkflowError: one is not.
    """
    known = [rule.name for rule in workflow.rules if not rule.has_wildcards() and not rule.script]
    for name in TARGETS:
        if name not in known and "/" not in name and not workflow.is_rule(name):
            papers = [key for key in GRID.experiments if "/" not in key]
            raise WorkflowError(f"{unknown('target', name, {*known, *papers})}\nNothing was run.")


# known before any job, also in a dry run and where there is nothing to do
logger.info(
    None,
    extra={
        "cupel": {
            "defences": {key: label for family in GRID.families.values() for key, label in family.labels("defences").items()},
            "tell": found,
        }
    },
)
