# What was spent, what came out, and where to browse it.


rule ledger:
    input:
        PLAN.inputs("ledger"),
    output:
        manifest=at("ledger", "manifest.json"),
    log:
        log_of("ledger"),
    benchmark:
        at("ledger", "benchmark.tsv")
    params:
        version=version("ledger"),
    shell:
        "python -m abf.cli ledger {output.manifest:q} 2>&1 | keep {log:q}"


rule report:
    input:
        PLAN.inputs("report"),
    output:
        manifest=at("report", "manifest.json"),
        page=report(
            at("report", "index.html"),
            category="Study",
            labels={"study": "{key}"},
            caption="../report/study.rst",
        ),
    log:
        log_of("report"),
    benchmark:
        at("report", "benchmark.tsv")
    params:
        version=version("report"),
    shell:
        "python -m abf.cli report {output.manifest:q} 2>&1 | keep {log:q}"


rule mlflow:
    input:
        PLAN.inputs("mlflow"),
    output:
        manifest=at("mlflow", "manifest.json"),
    log:
        log_of("mlflow"),
    benchmark:
        at("mlflow", "benchmark.tsv")
    params:
        version=version("mlflow"),
    shell:
        "python -m abf.cli mlflow {output.manifest:q} 2>&1 | keep {log:q}"
