import numpy as np, torch
import test_structure as t
from families import FAMILIES
def test_x():
    m=t.model_of(FAMILIES["beit"],"cpu")
    x=torch.randn(2,3,32,32); 
    def run():
        log=[]
        hs=[mod.register_forward_hook(lambda mod,a,o,n=n: log.append((n,[bool(v.isfinite().all()) for v in a if isinstance(v,torch.Tensor)],bool(o.isfinite().all()) if isinstance(o,torch.Tensor) else ""))) for n,mod in m.named_modules()]
        with torch.no_grad(): y=m(pixel_values=x).logits
        for h in hs: h.remove()
        return y,log
    for i in range(300):
        y,log=run()
        if not y.isfinite().all():
            print(i,[e for e in log if e[2] is False][:3]); assert 0
