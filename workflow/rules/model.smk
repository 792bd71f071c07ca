# The AR base, its conversion, and training.


rule base:
    input:
        PLAN.inputs("base"),
    output:
        manifest=at("base", "manifest.json"),
    log:
        log_of("base"),
    benchmark:
        at("base", "benchmark.tsv")
    retries: 0  # a loss that is not a number would be none the second time, and be paid for again
    threads: 1 if SUBMIT else PLAN.threads("base")
    params:
        version=version("base"),
    shell:
        "python -m abf.cli base {output.manifest:q} ${{ABF_SUBMIT:-}} 2>&1 | keep {log:q}"


rule convert:
    input:
        PLAN.inputs("convert"),
    output:
        manifest=at("convert", "manifest.json"),
    log:
        log_of("convert"),
    benchmark:
        at("convert", "benchmark.tsv")
    params:
        version=version("convert"),
    shell:
        "python -m abf.cli convert {output.manifest:q} 2>&1 | keep {log:q}"


rule train:
    input:
        PLAN.inputs("train"),
    output:
        manifest=at("train", "manifest.json"),
    log:
        log_of("train"),
    benchmark:
        at("train", "benchmark.tsv")
    retries: 0
    threads: 1 if SUBMIT else PLAN.threads("train")
    params:
        version=version("train"),
    shell:
        "python -m abf.cli train {output.manifest:q} ${{ABF_SUBMIT:-}} 2>&1 | keep {log:q}"
