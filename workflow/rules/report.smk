# What was spent, what came out, and where to browse it.


rule ledger:
    input:
        unpack(PLAN.inputs("ledger")),
    output:
        manifest=at("ledger", "manifest.json"),
        ledger=at("ledger", "ledger.parquet"),
    log:
        "logs/ledger/{key}.log",
    benchmark:
        at("ledger", "benchmark.tsv")
    params:
        version=version("ledger"),
    shell:
        "python -m abf.cli ledger {output.manifest} 2>&1 | tee {log}"


rule report:
    input:
        unpack(PLAN.inputs("report")),
    output:
        manifest=at("report", "manifest.json"),
        page=at("report", "index.html"),
        figures=directory(at("report", "figures")),
    log:
        "logs/report/{key}.log",
    benchmark:
        at("report", "benchmark.tsv")
    params:
        version=version("report"),
    shell:
        "python -m abf.cli report {output.manifest} 2>&1 | tee {log}"


rule mlflow:
    input:
        unpack(PLAN.inputs("mlflow")),
    output:
        manifest=at("mlflow", "manifest.json"),
        ingested=at("mlflow", "ingested.json"),
    log:
        "logs/mlflow/{key}.log",
    benchmark:
        at("mlflow", "benchmark.tsv")
    params:
        version=version("mlflow"),
    shell:
        "python -m abf.cli mlflow {output.manifest} 2>&1 | tee {log}"
