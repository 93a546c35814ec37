import os, sys
def test_a(capfd):
    real=os._exit
    def bad(c):
        import traceback; traceback.print_stack(file=open('/tmp/stack','w')); real(c)
    os._exit=bad
    from experiments import data
    from experiments.config import TrainConfig
    data.load(TrainConfig(batch_size=2000))
