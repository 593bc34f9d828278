#!/bin/sh
# k8s/run.sh TARGET [NAMESPACE]: run the four stages as Jobs, each when the one before it is complete.
#
# `make k8s-run TARGET=a800` calls it. If a stage fails, it prints the pod's last lines and exits with the stage's code.
# After Ctrl-C the current Job goes on in the cluster. The next start creates the Jobs again: finished stages end in a
# second, an unfinished stage resumes.
#
# REGISTRY=host/team in the environment is the prefix of the images' names, as `make push` tags them.
#
# Exit codes: 0 done; 2 wrong target, no kubectl, no cluster, or the cluster refuses; 75 a Job of that name still runs;
# else that of the failed stage, or 1 if its pods are gone.
set -eu

folder=$(dirname "$0")
poll=${LORRY_POLL_SECONDS:-5}
# Unanswered requests to the API server before this gives up: an upgrade of the control plane takes minutes.
patience=60

fail() { # code, message
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
command -v kubectl >/dev/null || fail 2 "kubectl is not installed, or not on the PATH"

kube() { kubectl ${namespace:+"--namespace=$namespace"} "$@"; }

# kubectl's last line is the reason; those before it are its retries
answer=$(kubectl version --request-timeout=20s 2>&1) ||
    fail 2 "no cluster answers: $(printf '%s\n' "$answer" | tail -n 1)"
manifests=$(kubectl kustomize "$overlay") || fail 2 "$overlay: kubectl kustomize cannot build it"

apply() { # component: apply that part of the overlay, not suspended, since this starts the Jobs in turn
    printf '%s\n' "$manifests" |
        sed -e 's/^  suspend: true$/  suspend: false/' -e "s#image: lorry-#image: ${REGISTRY:+$REGISTRY/}lorry-#" |
        kube apply --selector "app.kubernetes.io/component=$1" --filename - ||
        fail 2 "the cluster refused the manifests of '$1'"
}

conditions() { # job: its true conditions, such as Complete or Failed
    kube get job "$1" --output jsonpath='{range .status.conditions[?(@.status=="True")]}{.type}{" "}{end}'
}

pods() { # job, jsonpath of a pod: a line for each, the oldest first
    kube get pods --selector "job-name=$1" --sort-by=.metadata.creationTimestamp \
        --output jsonpath="{range .items[*]}$2{\"\\n\"}{end}"
}

exists() { # job. A request that fails must not count as "no such Job"
    found=$(kube get job "$1" --ignore-not-found --output name) || fail 2 "the cluster does not let you read Jobs"
    [ -n "$found" ]
}

refuse_running() { # job: of two Jobs on one run, one would only wait for the other
    exists "$1" || return 0
    case " $(conditions "$1")" in
    *" Complete "* | *" Failed "* | *" Suspended "*) ;;
    *) fail 75 "job/$1 still runs; wait until it ends, or stop it (it saves its state): kubectl delete job $1" ;;
    esac
}

report_failure() { # job
    echo "error: job/$1 failed: $(kube get job "$1" --output \
        jsonpath='{range .status.conditions[?(@.type=="Failed")]}{.reason}: {.message}{end}')" >&2
    # the last pod with an exit code: one that was stopped, or never started, has none
    failed=$(pods "$1" '{.metadata.name} {.status.containerStatuses[0].state.terminated.exitCode}' |
        awk '$2 != "" && $2 != 0 { last = $0 } END { print last }')
    if [ -z "$failed" ]; then
        echo "its pods are gone; the stage's log.txt in the run's folder has what it did" >&2
        exit 1
    fi
    pod=${failed% *} code=${failed##* }
    echo "the last lines of pod/$pod, which exited with $code:" >&2
    kube logs "$pod" --tail=40 >&2 || true
    exit "$code"
}

wait_for() { # job, stage: wait until the Job is complete or failed; `kubectl wait` watches one condition only
    shown='' unanswered=0
    while :; do
        if held=$(conditions "$1" 2>&1); then
            unanswered=0
            case " $held" in
            *" Complete "*) break ;;
            *" Failed "*) report_failure "$1" ;;
            esac
            state=$(pods "$1" '{.status.phase} {.status.containerStatuses[0].state.waiting.reason}' 2>/dev/null |
                tail -n 1)
            if [ "$state" != "$shown" ]; then
                echo "$2: $state"
                shown=$state
            fi
            case $state in
            *ImagePullBackOff | *InvalidImageName | *ErrImageNeverPull)
                fail 2 "$2: the nodes cannot pull its image ($state): make push REGISTRY=…, then make k8s-run REGISTRY=…"
                ;;
            esac
        else
            case $held in *NotFound*) fail 1 "job/$1 was deleted before it ended" ;; esac
            unanswered=$((unanswered + 1))
            [ "$unanswered" -lt "$patience" ] || fail 1 "the cluster no longer answers: $held"
        fi
        sleep "$poll"
    done
    echo "$2: done"
}

for stage in preprocess train infer eval; do
    refuse_running "lorry-$stage"
done
# existing claims stay: the server refuses a smaller size or another access mode
kube get pvc lorry-data lorry-models lorry-runs lorry-caches >/dev/null 2>&1 || apply storage
for stage in preprocess train infer eval; do
    job=lorry-$stage
    # a Job's template cannot be changed; foreground: waits until its pods are gone, and their lock on the run
    if exists "$job"; then
        kube delete job "$job" --cascade=foreground --wait || fail 2 "job/$job cannot be deleted"
    fi
    apply "$stage"
    wait_for "$job" "$stage"
done
