#!/bin/sh
# k8s/run.sh TARGET [NAMESPACE]: the four stages of a run as Jobs, in order, each when the one before it is complete.
#
# `make k8s-run TARGET=a800` calls it. A stage that fails ends it, with the pod's last lines and the stage's exit code.
# Ctrl-C leaves the Job of the moment to the cluster. Started again, this makes the Jobs again: a stage that is done
# says so in a second, one half done goes on where it was.
#
# REGISTRY=host/team in the environment stands before the images' names, as `make push` put them there.
#
# Exit codes: 0 done; 2 wrong target, no kubectl, no cluster, or the cluster refuses; 75 a Job of that name still runs;
# else the failed stage's own, or 1 where no pod is left to ask.
set -eu

folder=$(dirname "$0")
poll=${LORRY_POLL_SECONDS:-5}
# What the API server may fail to answer before this gives up on it: an upgrade of the control plane takes minutes.
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
[ -f "$known" ] || fail 2 "no target '$target'; there are: $(cd "$folder/overlays" && echo *)"
command -v kubectl >/dev/null || fail 2 "kubectl is not installed, or not on the PATH"

kube() { kubectl ${namespace:+"--namespace=$namespace"} "$@"; }

# The last line of what kubectl says is the reason; those before it are its retries.
answer=$(kubectl version --request-timeout=20s 2>&1) ||
    fail 2 "no cluster answers: $(printf '%s\n' "$answer" | tail -n 1)"
manifests=$(kubectl kustomize "$overlay") || fail 2 "$overlay cannot be built"

apply() { # component: that part of the overlay. Jobs are started here, in turn, so not suspended
    printf '%s\n' "$manifests" |
        sed -e 's/^  suspend: true$/  suspend: false/' -e "s#image: lorry-#image: ${REGISTRY:+$REGISTRY/}lorry-#" |
        kube apply --selector "app.kubernetes.io/component=$1" --filename - ||
        fail 2 "the cluster refused the manifests of '$1'"
}

conditions() { # job: those that hold, "Complete" and "Failed" among them
    kube get job "$1" --output jsonpath='{range .status.conditions[?(@.status=="True")]}{.type}{" "}{end}'
}

pods() { # job, jsonpath of one pod; the oldest first
    kube get pods --selector "job-name=$1" --sort-by=.metadata.creationTimestamp \
        --output jsonpath="{range .items[*]}$2{\"\\n\"}{end}"
}

exists() { # job. An answer that is no answer must not pass for "there is none"
    found=$(kube get job "$1" --ignore-not-found --output name) || fail 2 "the cluster does not let us look at Jobs"
    [ -n "$found" ]
}

refuse_running() { # job: two of them on one run would only wait for each other
    exists "$1" || return 0
    case " $(conditions "$1")" in
    *" Complete "* | *" Failed "* | *" Suspended "*) ;;
    *) fail 75 "job/$1 still runs; wait for it, or stop it (it saves its state): kubectl delete job $1" ;;
    esac
}

report_failure() { # job
    echo "error: job/$1 failed: $(kube get job "$1" --output \
        jsonpath='{range .status.conditions[?(@.type=="Failed")]}{.reason}: {.message}{end}')" >&2
    # a pod that was stopped, or never began, has no code: the last one that has
    failed=$(pods "$1" '{.metadata.name} {.status.containerStatuses[0].state.terminated.exitCode}' |
        awk '$2 != "" && $2 != 0 { last = $0 } END { print last }')
    if [ -z "$failed" ]; then
        echo "no pod of it is left; what it did is in the stage's log.txt, in the run's folder" >&2
        exit 1
    fi
    pod=${failed% *} code=${failed##* }
    echo "the last lines of pod/$pod, which exited with $code:" >&2
    kube logs "$pod" --tail=40 >&2 || true
    exit "$code"
}

wait_for() { # job, stage: until it is complete. `kubectl wait` for that alone would sleep through a failure
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
            case $held in *NotFound*) fail 1 "job/$1 was deleted while it was waited for" ;; esac
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
# Claims that are there stay as they are: the server refuses a smaller size or another access mode.
kube get pvc lorry-data lorry-models lorry-runs lorry-caches >/dev/null 2>&1 || apply storage
for stage in preprocess train infer eval; do
    job=lorry-$stage
    # a Job's template cannot be changed; foreground: its pods are gone, and with them their hold on the run
    if exists "$job"; then
        kube delete job "$job" --cascade=foreground --wait || fail 2 "job/$job cannot be deleted"
    fi
    apply "$stage"
    wait_for "$job" "$stage"
done
