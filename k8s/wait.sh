#!/bin/sh
# k8s/wait.sh JOB [NAMESPACE]: wait until a Job is complete or has failed. `kubectl wait --for=condition=complete` does
# not notice that a Job failed, and waits on.
#
#   k8s/wait.sh lorry-preprocess && kubectl apply -f k8s/train-job.yaml
#
# It prints what the pods do, and the cluster's own words while nothing starts. If the Job failed, it prints why, with
# the last lines of a pod. `lorry launch --on kubernetes` also says what to do about each reason.
#
# Exit codes: 0 complete; 2 no kubectl, or a pod whose image or container cannot be set up; the exit code of the stage
# that failed; 1 if no pod of it ran or is left, the Job was deleted, or the cluster no longer answers.
set -eu

poll=${LORRY_POLL_SECONDS:-5}
# It gives up after so many unanswered requests to the API server: an upgrade of the control plane takes minutes.
patience=60

fail() { # code, message: print the message and exit with the code
    echo "error: $2" >&2
    exit "$1"
}

[ $# -eq 1 ] || [ $# -eq 2 ] || fail 2 "usage: k8s/wait.sh JOB [NAMESPACE]"
job=${1#job/}
namespace=${2:-}
name=${job#lorry-}
command -v kubectl >/dev/null || fail 2 "no kubectl on the PATH; install it, or add its folder to PATH"

kube() { kubectl ${namespace:+"--namespace=$namespace"} "$@"; }

conditions() { # print the Job's true conditions, such as Complete or Failed
    kube get job "$job" --output jsonpath='{range .status.conditions[?(@.status=="True")]}{.type}{" "}{end}'
}

pods() { # jsonpath: print the value of each of the Job's pods, the oldest first
    kube get pods --selector "job-name=$job" --sort-by=.metadata.creationTimestamp \
        --output jsonpath="{range .items[*]}$1{\"\\n\"}{end}"
}

why() { # print the last warning about the Job or its pods, such as the scheduler's; nothing if there is none
    kube get events --sort-by=.metadata.creationTimestamp --output \
        jsonpath='{range .items[?(@.type=="Warning")]}{.involvedObject.name} {.reason}: {.message}{"\n"}{end}' 2>/dev/null |
        awk -v job="$job" '$1 == job || index($1, job "-") == 1 { sub(/^[^ ]+ /, ""); last = $0 } END { print last }'
}

report_failure() { # print why the Job failed and exit with its stage's code
    echo "error: job/$job failed: $(kube get job "$job" --output \
        jsonpath='{range .status.conditions[?(@.type=="Failed")]}{.reason}: {.message}{end}')" >&2
    indexes=$(kube get job "$job" --output jsonpath='{.status.failedIndexes}')
    [ -z "$indexes" ] || echo "failed indexes, counted from 0: $indexes" >&2
    # the last pod with an exit code; a pod that was stopped, or never started, has none
    failed=$(pods '{.metadata.name} {.status.containerStatuses[0].state.terminated.exitCode}' |
        awk '$2 != "" && $2 != 0 { last = $0 } END { print last }')
    if [ -z "$failed" ]; then
        reason=$(why)
        fail 1 "no pod of it ran or is left (${reason:-no event says why}); correct that, and create the Job again"
    fi
    pod=${failed% *} code=${failed##* }
    echo "the last lines of pod/$pod, which exited with $code:" >&2
    kube logs "$pod" --tail=40 >&2 || true
    exit "$code"
}

shown='' told='' unanswered=0
while :; do
    if held=$(conditions 2>&1); then
        unanswered=0
        case " $held" in
        *" Complete "*) break ;;
        *" Failed "*) report_failure ;;
        esac
        state=$(pods '{.status.phase} {.status.containerStatuses[0].state.waiting.reason}' 2>/dev/null | tail -n 1)
        if [ "$state" != "$shown" ]; then
            echo "$name: $state"
            shown=$state
        fi
        case $state in
        *CreateContainerConfigError)
            fail 2 "$name: its container cannot be set up ($(why)); create what is missing, and create the Job again"
            ;;
        *ImagePullBackOff | *InvalidImageName | *ErrImageNeverPull)
            fail 2 "$name: the nodes cannot pull its image ($state); make push REGISTRY=…, and put REGISTRY into the name of the image"
            ;;
        Running* | Failed* | Succeeded*) ;;
        *) # nothing runs: pending, suspended, or no pod could be made
            reason=$(why)
            if [ "$reason" != "$told" ]; then
                echo "$name: ${reason:-nothing is in the way}"
                told=$reason
            fi
            ;;
        esac
    else
        case $held in *NotFound*) fail 1 "no job/$job (it may have been deleted); create it, and run this again" ;; esac
        unanswered=$((unanswered + 1))
        [ "$unanswered" -lt "$patience" ] || fail 1 "the cluster no longer answers ($held); run this again"
    fi
    sleep "$poll"
done
echo "$name: done"
