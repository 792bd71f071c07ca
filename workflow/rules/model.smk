# The AR base, its conversion, and training.


rule base:
    input:
        unpack(PLAN.inputs("base")),
    output:
        manifest=at("base", "manifest.json"),
        base=directory(at("base", "base")),
    log:
        "logs/base/{key}.log",
    benchmark:
        at("base", "benchmark.tsv")
    threads: PLAN.threads("base")
    params:
        version=version("base"),
    shell:
        "python -m abf.cli base {output.manifest} 2>&1 | tee {log}"


rule convert:
    input:
        unpack(PLAN.inputs("convert")),
    output:
        manifest=at("convert", "manifest.json"),
        init=directory(at("convert", "init")),
    log:
        "logs/convert/{key}.log",
    benchmark:
        at("convert", "benchmark.tsv")
    params:
        version=version("convert"),
    shell:
        "python -m abf.cli convert {output.manifest} 2>&1 | tee {log}"


rule train:
    input:
        unpack(PLAN.inputs("train")),
    output:
        manifest=at("train", "manifest.json"),
        model=directory(at("train", "model")),
        metrics=at("train", "metrics.parquet"),
    log:
        "logs/train/{key}.log",
    benchmark:
        at("train", "benchmark.tsv")
    retries: 1
    threads: PLAN.threads("train")
    params:
        version=version("train"),
    shell:
        "python -m abf.cli train {output.manifest} 2>&1 | tee {log}"
