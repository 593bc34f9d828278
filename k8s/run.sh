#!/bin/sh
# k8s/run.sh TARGET [NAMESPACE]: run the four stages as Jobs, one after the other.
#
# `make k8s-run TARGET=a800` calls it. If a stage fails, it prints the last lines of its pod and exits with the stage's
# exit code. After Ctrl-C the current Job continues in the cluster. The next start creates the Jobs again: finished
# stages end in a second, and an unfinished stage resumes.
#
# REGISTRY in the environment, such as host/team, is the prefix of the images' names, as `make push` tags them.
#
# Exit codes: 0 done; 2 wrong target, no kubectl, no cluster, or a refused request; 75 a Job of that name still runs;
# the code of a failed stage, or 1 if its pods are gone.
set -eu

folder=$(dirname "$0")

fail() { # code, message: print the message and exit with the code
    echo "error: $2" >&2
    exit "$1"
}

[ $# -eq 1 ] || [ $# -eq 2 ] || fail 2 "usage: k8s/run.sh TARGET [NAMESPACE]"
target=$1
namespace=${2:-}
overlay=$folder/overlays/$target
case $target in
"" | */* | .*) known= ;;
*) known=$overlay/kustomization.yaml ;;
esac
[ -f "$known" ] || fail 2 "no target '$target'; known targets: $(cd "$folder/overlays" && echo *)"
command -v kubectl >/dev/null || fail 2 "no kubectl on the PATH; install it, or add its folder to PATH"

kube() { kubectl ${namespace:+"--namespace=$namespace"} "$@"; }

# kubectl's last line is the reason; those before it are its retries
answer=$(kubectl version --request-timeout=20s 2>&1) ||
    fail 2 "no cluster answers ($(printf '%s\n' "$answer" | tail -n 1)); set KUBECONFIG or the context"
manifests=$(kubectl kustomize "$overlay") ||
    fail 2 "$overlay: kubectl kustomize cannot build it; correct the file that it names above"

apply() { # component: apply that part of the overlay, not suspended, as this script starts the Jobs one by one
    printf '%s\n' "$manifests" |
        sed -e 's/^  suspend: true$/  suspend: false/' -e "s#image: lorry-#image: ${REGISTRY:+$REGISTRY/}lorry-#" |
        kube apply --selector "app.kubernetes.io/component=$1" --filename - ||
        fail 2 "the cluster refused the manifests of '$1'; see its reason above"
}

conditions() { # job: print its true conditions, such as Complete or Failed
    kube get job "$1" --output jsonpath='{range .status.conditions[?(@.status=="True")]}{.type}{" "}{end}'
}

exists() { # job: whether it exists; a request that fails must not count as "no such Job"
    found=$(kube get job "$1" --ignore-not-found --output name) ||
        fail 2 "the cluster does not let you read Jobs; ask its admin for the right to get, create and delete them"
    [ -n "$found" ]
}

refuse_running() { # job: exit with 75 if it still runs; a second Job on its run would only wait for it
    exists "$1" || return 0
    case " $(conditions "$1")" in
    *" Complete "* | *" Failed "* | *" Suspended "*) ;;
    *) fail 75 "job/$1 still runs; wait until it ends, or stop it (it saves its state): kubectl delete job $1" ;;
    esac
}

for stage in preprocess train infer eval; do
    refuse_running "lorry-$stage"
done
# existing claims stay as they are: the server would refuse a smaller size or another access mode
kube get pvc lorry-data lorry-models lorry-runs lorry-caches >/dev/null 2>&1 || apply storage
for stage in preprocess train infer eval; do
    job=lorry-$stage
    # a Job's template cannot be changed, so delete it; foreground waits until its pods, which lock the run, are gone
    if exists "$job"; then
        kube delete job "$job" --cascade=foreground --wait ||
            fail 2 "job/$job cannot be deleted; see the cluster's reason above"
    fi
    apply "$stage"
    "$folder/wait.sh" "$job" "$namespace"
done
