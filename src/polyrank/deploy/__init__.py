"""A deployment of polyrank over Flower: what server and clients run, and keys, processes and runs around it.

server         the server's Flower app
client         a client's Flower app
site           how a client answers
site_file      a client's file: what it is made of, and what it allows
holdings       what it has: data, and the model and data as a server wants them
consent        which runs it takes part in
policy         what may be asked of it
ledger         what its answers have told of its data
document       a JSON file that several processes change
check          a look at all of that before anybody is dialled
keeper         keeps a site's model loaded
certificates   the authority, the server's certificate, a key pair a node
layout         what lies where in a deployment's folder and in a node's, and in what environment Flower runs
templates      the text files that `provision` writes
provision      a deployment's folder: init, add, renew
supervise      keeps processes running, in the background; the standard library alone
control        Flower's command line, as functions
operate        the server: up, register, remove, status, down
join           a node
follow         a run: submit, follow, submit again
metrics        what Prometheus is told of a server; alerts.yaml has the alerts
exposition     the text format of metrics
backup         a server's folder in one file, and back
"""
