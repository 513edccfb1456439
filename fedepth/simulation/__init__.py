"""Many clients on one machine, or on a Ray cluster: the session, the planner and the aggregation that devices use.

A client is a list of places in one data set. Workers, which are processes of their own, train one client at a time; the
rounds are those of a coordinator (fedepth.rounds), played in time that a trace tells instead of a clock.
"""
