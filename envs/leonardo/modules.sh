# Source this in every shell before `.venv` is used; jobs get the same from `setup` in the site file.
# A module of CUDA is not needed: the wheels bring their own libraries, the node its driver.
if command -v module >/dev/null 2>&1; then
    module load python/3.11 # `module avail python` shows the exact name
else
    echo "envs/leonardo/modules.sh: no modules on this machine; $(command -v python3) is used" >&2
fi
