# Generation and scores.


rule decode:
    input:
        PLAN.inputs("decode"),
    output:
        manifest=at("decode", "manifest.json"),
    log:
        log_of("decode"),
    benchmark:
        at("decode", "benchmark.tsv")
    wildcard_constraints:
        key=r"[^/]+/[^/]+",
    threads: PLAN.threads("decode")
    params:
        version=version("decode"),
    shell:
        "python -m abf.cli decode {output.manifest:q} 2>&1 | keep {log:q}"


rule score:
    input:
        PLAN.inputs("score"),
    output:
        manifest=at("score", "manifest.json"),
    log:
        log_of("score"),
    benchmark:
        at("score", "benchmark.tsv")
    threads: PLAN.threads("score")
    params:
        version=version("score"),
    shell:
        "python -m abf.cli score {output.manifest:q} 2>&1 | keep {log:q}"
