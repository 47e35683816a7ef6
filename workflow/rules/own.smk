# Models of the user's own, as one YAML names them (docs/your-model.md): first look -> defences -> a page for each study -> one page

OWN_FOLDER = f"{config['results']}/own/{Path(config['own'] or 'none').stem}"
STUDY = f"{OWN_FOLDER}/{{model}}/{{budget}}/seed{{seed}}"

if "own" in TARGETS and not OWN:
    raise WorkflowError(
        "Nothing was run: own: say which models, by a YAML as in docs/your-model.md: "
        "snakemake --cores all --config own=mine.yaml -- own"
    )


# a device for each job, and time that grows: nothing is known of the network
OWN_RESOURCES = training(0, 8000, **dict.fromkeys(SCALES, 240))

if OWN:

    rule own:
        """Defences on models of your own."""
        input:
            f"{OWN_FOLDER}/index.html",

    rule look_at_own:
        """A network as it was given: measured, and looked at without the trigger; near chance the run ends here."""
        input:
            ancient(lambda wildcards: OWN.files(wildcards.model)),
        output:
            look=f"{STUDY}/look.json",
            reversed=f"{STUDY}/reversed.npz",
        log:
            PATHS.log(STUDY, "look"),
        benchmark:
            PATHS.benchmark(STUDY, "look")
        wildcard_constraints:
            model=only(OWN.models),
            budget=only(OWN.budgets),
        priority: FIRST
        resources:
            **OWN_RESOURCES,
        params:
            study=lambda wildcards: OWN.study(wildcards.model, wildcards.budget, wildcards.seed),
            code=lambda wildcards: code_digest(SCRIPTS / "look_at_own.py", *OWN.code(wildcards.model)),
        script:
            "../scripts/look_at_own.py"

    rule purify_own:
        """What a defence makes of a network, with its checkpoint and history beside the row of its table."""
        input:
            ancient(lambda wildcards: OWN.files(wildcards.model)),
            look=rules.look_at_own.output,
        output:
            row=f"{STUDY}/rows/{{defence}}.json",
        log:
            PATHS.log(STUDY, "{defence}"),
        benchmark:
            PATHS.benchmark(STUDY, "{defence}")
        wildcard_constraints:
            model=only(OWN.models),
            budget=only(OWN.budgets),
            defence=only(OWN.defences),
        retries: 1
        resources:
            **OWN_RESOURCES,
        params:
            study=lambda wildcards: OWN.study(wildcards.model, wildcards.budget, wildcards.seed),
            settings=lambda wildcards: OWN.defences[wildcards.defence],
            code=lambda wildcards: code_digest(SCRIPTS / "purify_own.py", *OWN.code(wildcards.model, wildcards.defence)),
        script:
            "../scripts/purify_own.py"

    rule report_own:
        """Table and page of all defences on one network."""
        input:
            rules.look_at_own.output,
            rows=expand(rules.purify_own.output.row, defence=OWN.defences, allow_missing=True),
        output:
            page=f"{STUDY}/index.html",
            table=f"{STUDY}/results.csv",
        log:
            PATHS.log(STUDY, "report"),
        benchmark:
            PATHS.benchmark(STUDY, "report")
        localrule: True
        params:
            defences=OWN.defences,
            code=code_digest(SCRIPTS / "report_own.py", *TEMPLATES),
        script:
            "../scripts/report_own.py"

    rule gather_own:
        """One table and one page over all networks, budgets and seeds."""
        input:
            [f"{OWN_FOLDER}/{own.folder(study)}/results.csv" for study in OWN.studies],
        output:
            page=f"{OWN_FOLDER}/index.html",
            table=f"{OWN_FOLDER}/results.csv",
        log:
            PATHS.log(OWN_FOLDER, "gather"),
        benchmark:
            PATHS.benchmark(OWN_FOLDER, "gather")
        localrule: True
        params:
            studies=OWN.studies,
            code=code_digest(SCRIPTS / "gather_own.py", *TEMPLATES),
        script:
            "../scripts/gather_own.py"
