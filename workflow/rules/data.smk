# Text to packed rows.


rule fetch:
    input:
        PLAN.inputs("fetch"),
    output:
        manifest=at("fetch", "manifest.json"),
    log:
        log_of("fetch"),
    benchmark:
        at("fetch", "benchmark.tsv")
    params:
        version=version("fetch"),
    shell:
        "python -m abf.cli fetch {output.manifest:q} 2>&1 | keep {log:q}"


rule prepare:
    input:
        PLAN.inputs("prepare"),
    output:
        manifest=at("prepare", "manifest.json"),
    log:
        log_of("prepare"),
    benchmark:
        at("prepare", "benchmark.tsv")
    params:
        version=version("prepare"),
    shell:
        "python -m abf.cli prepare {output.manifest:q} 2>&1 | keep {log:q}"


rule tokenizer:
    input:
        PLAN.inputs("tokenizer"),
    output:
        manifest=at("tokenizer", "manifest.json"),
    log:
        log_of("tokenizer"),
    benchmark:
        at("tokenizer", "benchmark.tsv")
    params:
        version=version("tokenizer"),
    shell:
        "python -m abf.cli tokenizer {output.manifest:q} 2>&1 | keep {log:q}"


rule tokenize:
    input:
        PLAN.inputs("tokenize"),
    output:
        manifest=at("tokenize", "manifest.json"),
    log:
        log_of("tokenize"),
    benchmark:
        at("tokenize", "benchmark.tsv")
    params:
        version=version("tokenize"),
    shell:
        "python -m abf.cli tokenize {output.manifest:q} 2>&1 | keep {log:q}"


rule segment:
    input:
        PLAN.inputs("segment"),
    output:
        manifest=at("segment", "manifest.json"),
    log:
        log_of("segment"),
    benchmark:
        at("segment", "benchmark.tsv")
    params:
        version=version("segment"),
    shell:
        "python -m abf.cli segment {output.manifest:q} 2>&1 | keep {log:q}"


rule pack:
    input:
        PLAN.inputs("pack"),
    output:
        manifest=at("pack", "manifest.json"),
    log:
        log_of("pack"),
    benchmark:
        at("pack", "benchmark.tsv")
    params:
        version=version("pack"),
    shell:
        "python -m abf.cli pack {output.manifest:q} 2>&1 | keep {log:q}"
