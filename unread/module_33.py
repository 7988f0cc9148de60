def function_33(x):
    return x + 33
def function_33(x):
    return x + 33
def function_33(x):
    return x + 33
def function_33(x):
    return x + 33
def function_33(x):
    return x + 33
